#!/usr/bin/env bash
# What an operator gives to defer(kwargs=...) is passed to the method that it resumes in, beside the trigger's event:
# so it is with scheduler and triggerer (airflow/models/trigger.py, handle_event_submit). `airflow dags test` and
# dag.test() of Airflow 3.3.2 (task SDK 1.3.2) put the event in place of them, so that an operator that works fails in
# its test, or worse, goes on with defaults: airflow/sdk/definitions/dag.py, `ti.next_kwargs = {"event": ...} if event
# else ...`. Mended after this release (apache/airflow pull request 69942).
set -euo pipefail

constraints=$(cd "$(dirname "$0")/.." && pwd)/constraints/airflow-3.3.2.txt
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
cd "$directory"

python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check --constraint "$constraints" \
    apache-airflow-core==3.3.2 apache-airflow-task-sdk==1.3.2 apache-airflow-providers-standard

mkdir dags
cat >dags/resumes.py <<'PYTHON'
import os
from datetime import timedelta

from airflow.providers.standard.triggers.temporal import TimeDeltaTrigger
from airflow.sdk import DAG, BaseOperator


class Job(BaseOperator):
    def execute(self, context):
        self.defer(
            trigger=TimeDeltaTrigger(timedelta(milliseconds=1)), method_name="look", kwargs={"job": "number 42"}
        )

    def look(self, context, job="nothing", event=None):
        with open(os.environ["NOTES"], "a") as notes:
            print(job, file=notes)


with DAG("resumes", schedule=None):
    Job(task_id="job")
PYTHON

for name in "${!AIRFLOW__@}"; do
    unset "$name"
done
export AIRFLOW_HOME=$directory AIRFLOW__CORE__DAGS_FOLDER=$directory/dags AIRFLOW__CORE__LOAD_EXAMPLES=False
export AIRFLOW__USAGE_DATA_COLLECTION__ENABLED=False NOTES=$directory/notes
# Airflow logs to both outputs.
venv/bin/airflow db migrate >log 2>&1 || { cat log >&2; exit 1; }
timeout 300 venv/bin/airflow dags test resumes >log 2>&1 || { cat log >&2; exit 1; }

echo "Airflow $(venv/bin/airflow version 2>/dev/null)"
seen=$(<notes)
echo "Given to defer(): number 42. Passed to the method: $seen."
if [[ $seen == nothing ]]; then
    echo "As described: the arguments are lost."
else
    echo "This has changed: expected that nothing is passed." >&2
    exit 1
fi
