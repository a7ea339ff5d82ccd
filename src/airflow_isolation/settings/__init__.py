"""From airflow.cfg, DAG metadata YAML, executor_config, hook and policy to a ContainerSpec.

declarations            every key there is, once: the source of parsing, provider info and docs/settings.md
quantities, formats     text → value
document                YAML text or Python objects → a tree that knows its lines
airflow_configuration   what airflow.cfg and AIRFLOW__ variables say, and where
dag_metadata            the YAML beside a DAG file
layers                  a section or a document → assignments, each with its origin
hook                    the administrator's function get_docker_runtime_image
policy                  what the administrator forbids
resolve                 all of it in order → EffectiveSettings
spec                    EffectiveSettings → ContainerSpec
"""
