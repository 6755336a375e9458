"""Where jobs are looked for."""

import pytest

from domainbed_reasoning.results.job_folders import read_jobs


def test_a_folder_above_the_sweeps_is_refused_with_where_the_jobs_are(tmp_path):
    for name in ("b", "a"):
        (tmp_path / "dataset" / "regime" / name / "0123456789abcdef0123456789abcdef" / "saved").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"a folder of sweeps\. There are jobs in \S*/regime/a, \S*/regime/b\.$"):
        read_jobs(tmp_path)
    with pytest.raises(ValueError, match=r"a folder of sweeps\.$"):
        read_jobs(tmp_path / "empty")
    assert {job.sweep for job in read_jobs(tmp_path / "dataset" / "regime")} == {"a", "b"}
