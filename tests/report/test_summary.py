"""The table for the terminal."""

import pytest

from efficient_vlm.report.summary import summary_table, summary_text


def test_every_setting_has_a_line_with_its_numbers(write_workdir):
    _, results = write_workdir(with_maps=False)
    text = summary_text(results)
    lines = [line.split() for line in text.splitlines()]
    for row in results["cost"]:
        line = next(w for w in lines if w[:2] == [row["compressor"], str(row["budget"])])
        scores = [
            r
            for r in results["eval"]
            if (r["compressor"], r["budget"]) == (row["compressor"], row["budget"])
        ]
        assert line[2::2][:4] == [f"{100 * r['accuracy']:.1f}" for r in scores]
        halves = [f"±{50 * (r['ci95'][1] - r['ci95'][0]):.1f}" for r in scores]
        assert line[3::2][:4] == halves
        assert float(line[-2]) == pytest.approx(sum(row["flops"].values()) / 1e6, abs=0.006)
        assert float(line[-1]) == pytest.approx(row["ms"]["prefill"], abs=0.006)
    budgets = [int(w[1]) for w in lines if len(w) == 12 and w[1].isdigit()]
    assert budgets == sorted(budgets, reverse=True)


@pytest.mark.parametrize("tasks", [4, 7])
def test_fits_100_columns_and_is_plain_when_piped(tasks):
    names = ["needle", "count", "point", "global", "relation", "absent", "dense"][:tasks]
    rows = [
        {"compressor": c, "budget": 16, "task": t, "accuracy": 0.931, "ci95": [0.9, 0.95], "n": 9}
        for c in ("average_pool", "pixel_shuffle")
        for t in names
    ]
    text = summary_text({"eval": rows})
    assert "\x1b" not in text
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 100
    assert "…" not in text
    assert "pixel_shuffle" in text
    for name in names:
        assert name in text


@pytest.mark.parametrize("results", [{}, {"eval": []}, {"cost": [{"budget": 4}]}, {"eval": [3]}])
def test_missing_parts_leave_dashes(results):
    assert summary_table(results).row_count == len(results.get("cost", []))
    summary_text(results)
