"""``airflow containers …``: look at, end and clear away containers; images; settings; one task on its own.

definition  the parser's words: loaded by every ``airflow`` call, so it imports nothing of ours
outcome     exit codes, and errors as sentences
backends    which daemons a command asks, and the container that an abbreviated id means
output      rows as table, json, yaml or plain
formats     age, sizes and times for people
settings    effective settings as rows, secrets masked

and one module a command: listing, inspection, logs, kill, update, prune, config, images, task_test.
"""
