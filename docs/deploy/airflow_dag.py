"""An Airflow DAG: embed, publish, fill the online store, every night.

Each task is a command, so that the scheduler's environment needs neither Spark nor torch. A retry goes on where the
attempt before it stopped, because the run's id is made of the date.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from airflow import DAG
from airflow.operators.bash import BashOperator

CONFIG = "/project/instructue.yaml"
RUN = "nightly-{{ data_interval_end | ds }}"

with DAG(
    dag_id="instructue_nightly",
    schedule="30 1 * * *",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,  # two publishers would only make one of them fail
    default_args={"retries": 2, "retry_delay": timedelta(minutes=10), "execution_timeout": timedelta(hours=8)},
) as dag:
    backfill = BashOperator(
        task_id="backfill",
        bash_command=(
            f"instructue backfill --config {CONFIG} --run-id {RUN} "
            "--as-of {{ data_interval_end | ds }}T00:00:00Z --no-publish"
        ),
        append_env=True,
        env={"INSTRUCTUE_PUSHGATEWAY": "pushgateway.monitoring:9091"},
    )
    publish = BashOperator(task_id="publish", bash_command=f"instructue publish {RUN} --config {CONFIG}")
    materialize = BashOperator(task_id="materialize", bash_command="instructue materialize --repo /project")
    backfill >> publish >> materialize
