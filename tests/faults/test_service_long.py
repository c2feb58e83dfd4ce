"""Faults of services with all the waiting that they take; shorter ones, of the same code, are in `make test`."""

from pathlib import Path

import pytest

from swa_dist.storage.s3 import Prefix
from tests.unit.test_s3 import check_outages

pytestmark = [pytest.mark.faults]


def test_an_outage_of_s3_is_a_service_error_in_bounded_time_with_all_the_waits_of_boto3(
    s3: str, s3_server: str, tmp_path: Path
) -> None:
    check_outages(Prefix(f"{s3}/runs/swa-1"), s3_server, tmp_path, most_seconds=40)
