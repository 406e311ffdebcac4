"""A DAG whose task works with a token of its own, one per task and run, whichever try it is."""

from datetime import datetime, timedelta

from airflow.sdk import dag, get_current_context, task
from broker_token import broker_token, job_id, last_try


@dag(schedule="@daily", start_date=datetime(2026, 1, 1), catchup=False)
def invoices():
    @task(retries=3, retry_delay=timedelta(minutes=1))
    def archive():
        context = get_current_context()
        with broker_token(
            "invoices",
            job_id(context),
            dedicated=True,
            revoke_after_success=True,
            revoke_after_failure=last_try(context),
        ) as path:
            return work(path)

    archive()


def work(path):
    """Stands for your own; it reads the file each time it needs the token."""
    import os
    import urllib.request

    with open(path, encoding="ascii") as file:
        token = file.read().strip()
    request = urllib.request.Request(os.environ["VANTAGE_SKILLS"], headers={"Authorization": "Bearer " + token})
    with urllib.request.urlopen(request, timeout=30) as response:
        return response.status


invoices()
