"""A little of the fault campaign; all of it is `scripts/faults`."""

import pytest

from tests.faults import small_campaign
from tests.held import is_measured


@pytest.mark.slow
@pytest.mark.skipif(is_measured(), reason="a fork that begins to be measured holds the lock meanwhile")
def test_a_small_campaign_loses_nothing(tmp_path, forks, capsys):
    lost = small_campaign(tmp_path, forks)
    told = capsys.readouterr().out
    assert lost == 0, told
    assert ", 0 lost" in told
    assert "a Hub that answers 500" in told
