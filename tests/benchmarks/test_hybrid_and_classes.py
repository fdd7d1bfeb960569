"""The benchmarks of layers on servers print their measurements, here of runs as small as can be."""

from __future__ import annotations

from click.testing import CliRunner

from benchmarks import classes, hybrid


def test_classes_prints_a_row_for_each_number_of_them() -> None:
    done = CliRunner().invoke(classes.cli, ["--classes", "500", "--rounds", "3", "--batch", "4"], catch_exceptions=False)
    assert done.exit_code == 0
    (row,) = [line.strip("| ").split("|") for line in done.output.splitlines() if line.lstrip("| ").startswith("500 |")]
    megabytes, memory, weights = map(float, row[2:])
    assert 0.0 < megabytes < 0.1 and 0.05 < memory < 3.0 and weights == 0.0


def test_hybrid_and_data_cross_where_the_weights_of_a_round_are_its_activities() -> None:
    assert round(hybrid.crossing(1000, 2)) == 1363
    for classes_, servers in ((10, 1), (1000, 4)):
        weights = 9217 * 4096 + 4097 * 4096 + 4097 * classes_
        activities = hybrid.crossing(classes_, servers) * (servers * (9216 + 2 * 4096) + 2 * 4096)
        assert abs(activities - weights) < 1
