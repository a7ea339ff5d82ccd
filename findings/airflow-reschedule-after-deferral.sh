#!/usr/bin/env bash
# A deferred task that has been resumed and then raises AirflowRescheduleException, because it wants to look again
# later, should come back to the method that it was in. Airflow 3.3.2 begins with execute() again, which submits the
# job a second time: the execution API clears next_method and next_kwargs when it notes the reschedule, although it is
# still the same try (airflow/api_fastapi/execution_api/routes/task_instances.py, "clear the next_method and
# next_kwargs").
#
# `airflow dags test` runs the DAG here: it takes a deferral and a reschedule through the same execution API.
set -euo pipefail

constraints=$(cd "$(dirname "$0")/.." && pwd)/constraints/airflow-3.3.2.txt
directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
cd "$directory"

python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check --constraint "$constraints" \
    apache-airflow-core==3.3.2 apache-airflow-task-sdk==1.3.2 apache-airflow-providers-standard

mkdir dags
cat >dags/again.py <<'PYTHON'
import os
from datetime import timedelta

from airflow.providers.standard.triggers.temporal import TimeDeltaTrigger
from airflow.sdk import DAG, BaseOperator, timezone
from airflow.sdk.exceptions import AirflowRescheduleException


def note(text):
    with open(os.environ["NOTES"], "a") as notes:
        print(text, file=notes)


class Job(BaseOperator):
    def execute(self, context):
        note("execute")
        self.defer(trigger=TimeDeltaTrigger(timedelta(milliseconds=1)), method_name="look")

    def look(self, context, event=None):
        note("look")
        with open(os.environ["NOTES"]) as notes:
            first = notes.read().count("look") == 1
        if first:
            raise AirflowRescheduleException(timezone.utcnow())


with DAG("again", schedule=None):
    Job(task_id="job")
PYTHON

for name in "${!AIRFLOW__@}"; do
    unset "$name"
done
export AIRFLOW_HOME=$directory AIRFLOW__CORE__DAGS_FOLDER=$directory/dags AIRFLOW__CORE__LOAD_EXAMPLES=False
export AIRFLOW__USAGE_DATA_COLLECTION__ENABLED=False NOTES=$directory/notes
# Airflow logs to both outputs.
venv/bin/airflow db migrate >log 2>&1 || { cat log >&2; exit 1; }
timeout 300 venv/bin/airflow dags test again >log 2>&1 || { cat log >&2; exit 1; }

echo "Airflow $(venv/bin/airflow version 2>/dev/null)"
seen=$(tr '\n' ' ' <notes)
echo "Called: $seen"
if [[ $seen == "execute look execute look " ]]; then
    echo "As described: after look() had asked for a reschedule, the task began anew."
else
    echo "This has changed: expected execute look execute look." >&2
    exit 1
fi
