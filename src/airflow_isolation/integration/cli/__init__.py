"""``airflow containers …``: show, end and clear away containers; images; settings; run one task or parse one file.

definition  the parser's arguments: every ``airflow`` call loads it, so it imports nothing else of ours
outcome     exit codes, and errors as sentences
backends    which daemons a command asks, and the container that an abbreviated id means
output      rows as table, json, yaml or plain
formats     age, sizes and times for people
settings    effective settings as rows, secrets masked

and one module for each command: listing, inspection, logs, kill, update, prune, config, images, parse, dag_processor,
stats, task_test.
"""
