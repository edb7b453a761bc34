"""Experiments: grids ask for the right trials, the analysis is right on known numbers, the page is of the results."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from distmuon.step import bucket
from experiments import finetune, images, overhead, page, runner, variants
from experiments.analysis import (
    AGREES,
    CANNOT_TELL,
    DISAGREES,
    NOT_MEASURED,
    NOT_RUN,
    Interval,
    View,
    arms_of,
    interval,
    t_quantile,
    visible,
)
from experiments.grids import FOLDER, LR, SEED, Experiment, Wanted, read, read_all
from experiments.trial import RESULTS, Results, in_a_process, measured, trial_of
from launch.config import TrainConfig

NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
TINY = """
number: 1
title: Two rates
hypothesis: One is better.
source: nobody
config: configs/experiments/tiny.yaml
set: {train.eval_batches: 1, train.warmup_steps: 1}
rates: {some: [1.0e-2, 2.0e-2]}
arms:
  tuned: {rates: some, set: {optimizer.name: distmuon}}
  same: {set: {optimizer.name: distmuon, optimizer.lr: {best: tuned, times: 0.5}, train.eval_every: {times: 2}}}
  nobody's: {variant: sgd, set: {optimizer.name: adamw, optimizer.lr: 0.1}}
claims:
- {text: half the rate is worse, quantity: loss, of: same, than: tuned, expect: higher}
- {text: within a tenth, quantity: loss, of: same, than: tuned, expect: tie, margin: 0.1}
- {text: fewer steps, quantity: steps, of: {arm: tuned, to: same}, than: 0.9, expect: lower}
- {text: fewer seconds, quantity: seconds, of: {arm: tuned, to: same}, than: 0.9, expect: lower}
- {text: entropies, quantity: share, of: {arm: tuned, to: same}, than: 0.9, expect: higher}
- text: of gates
  quantity: entropy_gain
  of: {arm: tuned, to: same, only: gate}
  than: {arm: tuned, to: same, but: gate}
  expect: higher
- {text: heavier, quantity: weight_rms, of: tuned, than: same, expect: higher}
- {text: the better of two, quantity: loss, of: [same, tuned], than: nobody's, expect: lower}
- {text: costs less than a tenth, quantity: loss, of: same, than: tuned, expect: at_most, margin: 0.1}
- {text: costs more than a hundredth, quantity: loss, of: same, than: tuned, expect: over, margin: 0.01}
- {text: moves, quantity: update_rms, of: tuned, than: 0.2, expect: lower}
ratios: [[same, tuned, nobody's]]
picture: {kind: over_arms}
check: {arm: tuned, band: 0.1}
sizes:
  small: {seeds: [1, 2, 3]}
  quick: {seeds: [1], set: {train.steps: 6, train.eval_every: 3}, rates: {some: [1.0e-2]}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "two.yaml").write_text(TINY)
    return tmp_path


@pytest.fixture
def experiment(folder: Path) -> Experiment:
    return read("two", "small", folder)


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return Results(tmp_path / "trials.jsonl")


def finish(results: Results, wanted: Wanted, loss: float | None, **row: Any) -> None:
    """What a trial leaves."""
    said = {"settings": wanted.settings, "variant": wanted.variant, "nproc": wanted.nproc}
    measured = {
        "val_loss": loss,
        "val": [[0, 5.0], [60, 3.0], [120, loss]],
        "cpu_s": 10.0,
        "entropy": {"0.q_proj": 0.8, "0.gate": 0.6},
        "telemetry": [
            {
                "step": 120,
                "weight_rms": {"q_proj": 0.1, "gate": 0.3},
                "update_rms": {"q_proj": 0.15, "gate": 0.17},
                "output_rms": 2.0,
            }
        ],
    }
    results.add(wanted, {**said, **measured, **row})


def finish_all(experiment: Experiment, results: Results, loss: Callable[[Wanted], float | None], **row: Any) -> None:
    while missing := experiment.missing(results.loss):
        for wanted in missing:
            finish(results, wanted, loss(wanted), **row)


def test_tuning_comes_first_and_does_not_count(experiment: Experiment, results: Results) -> None:
    def settings(of: list[Wanted]) -> list[tuple[str, float, int]]:
        return [(wanted.variant, wanted.settings[LR], wanted.seed) for wanted in of]

    first = experiment.missing(results.loss)
    assert settings(first) == [("", 0.01, 0), ("", 0.02, 0), *(("sgd", 0.1, seed) for seed in (1, 2, 3))]
    for wanted, loss in zip(first, (3.0, 2.0, 4.0, 4.0, 4.0)):
        finish(results, wanted, loss)
    second = experiment.missing(results.loss)
    assert settings(second) == [("", rate, seed) for rate in (0.02, 0.01) for seed in (1, 2, 3)]
    assert [wanted.settings["train.eval_every"] for wanted in second] == [75] * 3 + [150] * 3
    finish_all(experiment, results, lambda wanted: 2.5)
    view = View(experiment, Results(results.path))
    assert set(view.losses("tuned")) == {1, 2, 3} and view.tuned("tuned") == [(0.01, 3.0), (0.02, 2.0)]
    assert view.rate("tuned") == 0.02 and view.is_on_edge("tuned") and not view.is_on_edge("same")


def test_a_rate_at_which_nothing_trains_is_not_chosen(experiment: Experiment, results: Results) -> None:
    finish_all(experiment, results, lambda wanted: None if wanted.settings[LR] == 0.02 else 2.0)
    assert experiment.best_rate(experiment.arms["tuned"], results.loss) == 0.01
    everything = Results(results.path.with_name("other.jsonl"))
    finish_all(experiment, everything, lambda wanted: None)
    assert experiment.final(experiment.arms["same"], everything.loss) is None


def test_the_quantile_of_student() -> None:
    """As in the tables of every textbook."""
    for freedom, known in ((1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (30, 2.042)):
        assert t_quantile(freedom) == pytest.approx(known, abs=6e-4)
    assert t_quantile(2, inside=0.6) == pytest.approx(1.061, abs=6e-4)


def test_what_a_test_can_see() -> None:
    """Differences with a standard deviation of 1 over three seeds: (4.303 + 1.061) standard errors."""
    assert visible(interval([1.0, 2.0, 3.0]), 3) == pytest.approx((4.303 + 1.061) / math.sqrt(3), abs=1e-3)
    assert visible(interval([1.0]), 1) == math.inf


def test_the_interval_of_three_values() -> None:
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0 and found.high - 2.0 == pytest.approx(4.3027 / math.sqrt(3), abs=1e-3)
    assert found.high - found.mean == pytest.approx(found.mean - found.low)
    assert interval([2.0]) == Interval(mean=2.0, low=-math.inf, high=math.inf)
    assert interval([math.inf, 1.0]).low == math.inf
    assert str(interval([math.inf, 1.0])) == "infinite" and str(interval([2.0])) == "2"


LOSSES = {"tuned": (2.0, 2.1, 2.2), "same": (2.1, 2.21, 2.29), "nobody's": (4.0, 4.0, 4.0)}


def planted(experiment: Experiment, results: Results, losses: Mapping[str, Sequence[float | None]]) -> list[str]:
    """The verdicts on trials that have these losses."""

    def loss(wanted: Wanted) -> float | None:
        if wanted.seed == 0:
            return 3.0 - float(wanted.settings[LR])
        arm = "nobody's" if wanted.variant else "tuned" if wanted.settings[LR] == 0.02 else "same"
        return losses[arm][wanted.seed - 1]

    finish_all(experiment, results, loss)
    view = View(experiment, results)
    return [view.verdict(claim).word for claim in experiment.claims]


def test_verdicts_on_known_losses(experiment: Experiment, results: Results) -> None:
    found = planted(experiment, results, LOSSES)
    # half the rate is worse by 0.1, 0.11 and 0.09
    assert found[:2] == [AGREES, AGREES]
    # entropies and weights are equal on both sides
    assert found[4] == DISAGREES and found[5] == CANNOT_TELL and found[6] == CANNOT_TELL
    assert found[7] == AGREES
    assert found[8] == AGREES and found[9] == AGREES
    assert found[10] == AGREES  # 0.16 on every seed


def test_steps_and_seconds_to_equal_loss(experiment: Experiment, results: Results) -> None:
    planted(experiment, results, LOSSES)
    view = View(experiment, results)
    # a curve from 3 at step 60 to 2 at 120 is at 2.1 after 114
    shares = [(60 + 60 * (3 - other) / (3 - mine)) / 120 for mine, other in zip(LOSSES["tuned"], LOSSES["same"])]
    assert shares[0] == pytest.approx(0.95)
    assert view.steps_share("tuned", "same").mean == pytest.approx(sum(shares) / 3)
    assert view.steps_share("same", "tuned").mean == math.inf
    for row in view.rows("tuned").values():
        row["cpu_s"] = 20.0
    claim = {"text": "", "quantity": "seconds", "of": {"arm": "tuned", "to": "same"}, "than": 1.0, "expect": "lower"}
    found = view.verdict(claim)
    assert found.found is not None and found.found.mean == pytest.approx(2 * sum(shares) / 3)
    assert found.word == DISAGREES


def test_verdicts_need_the_whole_interval(experiment: Experiment, results: Results) -> None:
    """One seed against the others: the mean is on one side, and the data cannot tell."""
    found = planted(experiment, results, {**LOSSES, "same": (2.3, 2.0, 2.35)})
    assert found[0] == CANNOT_TELL and found[1] == CANNOT_TELL


def test_better_by_more_than_the_margin_is_no_tie(experiment: Experiment, results: Results) -> None:
    found = planted(experiment, results, {**LOSSES, "same": (1.5, 1.6, 1.7)})
    assert found[:2] == [DISAGREES, DISAGREES]
    assert found[8:10] == [AGREES, DISAGREES]  # what is better costs nothing
    view = View(experiment, results)
    verdict = view.verdict(experiment.claims[0])
    assert verdict.seeds == 3 and verdict.visible == pytest.approx(0.0, abs=1e-9)
    (row,) = page.ratio_table(view)[2:-1]
    assert row.startswith("|  | 0.02 | 0.01 | 0.5 | 4.0000 ± 0.0000 | 1.6000 ± 0.2484 |")


def test_a_cost_above_the_margin_is_told(experiment: Experiment, results: Results) -> None:
    found = planted(experiment, results, {**LOSSES, "same": (2.5, 2.6, 2.7)})
    assert found[8:10] == [DISAGREES, AGREES]


def test_verdicts_on_a_run_that_diverged(experiment: Experiment, results: Results) -> None:
    found = planted(experiment, results, {**LOSSES, "same": (2.1, None, 2.1)})
    assert found[0] == AGREES and found[1] == DISAGREES


def test_what_was_not_measured_is_not_judged(experiment: Experiment, results: Results) -> None:
    finish_all(experiment, results, lambda wanted: 2.0, telemetry=[{"step": 120, "weight_rms": {"q_proj": 0.1}}])
    claim = {"text": "", "quantity": "output_rms", "of": "same", "than": "tuned", "expect": "lower"}
    assert View(experiment, results).verdict(claim).word == NOT_MEASURED


def test_what_has_not_run_is_not_judged(experiment: Experiment, results: Results) -> None:
    view = View(experiment, results)
    assert {view.verdict(claim).word for claim in experiment.claims} == {NOT_RUN}


@pytest.mark.parametrize("name", NAMES)
def test_a_grid_is_whole(name: str) -> None:
    """Every claim is about arms that are there, sides of a comparison have equally many rates, a test can check it."""
    given = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert {"small", "full", "quick"} <= given["sizes"].keys()
    for size in given["sizes"]:
        experiment = read(name, size)
        assert 0 not in experiment.seeds and experiment.hypothesis and experiment.source
        assert experiment.missing(lambda _: None)
        nothing = View(experiment, Results(Path("nowhere")))
        assert page.ratio_table(nothing) == page.kinds_table(nothing) == []
    experiment = read(name, "full")
    assert experiment.check["arm"] in experiment.arms and 0 < experiment.check["band"] <= (
        0.5 if "resnet" in name else 0.1
    )  # the ResNet's loss ends near 0
    assert experiment.picture["kind"] in page.PICTURES
    view = View(experiment, Results(Path("nowhere")))
    assert {view.verdict(claim).word for claim in experiment.claims} == {NOT_RUN}
    named = json.dumps([experiment.claims, experiment.picture])
    for arm in re.findall(r'"(?:arm|to)": "(.*?)"', named):
        assert arm in experiment.arms
    for claim in experiment.claims:
        sides = [claim["of"]["arm"], claim["of"]["to"]] if isinstance(claim["of"], dict) else []
        rates = [experiment.arms[arm].rates for arm in sides]
        assert len({len(experiment.rates[rate]) for rate in rates if rate}) <= 1, claim


def test_a_size_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"two\.yaml: found no size 'huge'; small, quick are there"):
        read("two", "huge", folder)


def test_a_variant_of_several_processes_is_refused(folder: Path) -> None:
    path = folder / "two.yaml"
    path.write_text(TINY.replace("small: {", "small: {nproc: 2, "))
    with pytest.raises(ValueError, match=r"found variant sgd with 2 processes in arm nobody's"):
        read("two", "small", folder)


def test_the_page_is_what_the_results_give() -> None:
    """`python -m experiments.page` makes it."""
    text = page.render(Results(RESULTS))
    assert (page.DOCS / "experiments.md").read_text() == text
    for picture in re.findall(r"\]\((experiments/\S+\.png)\)", text):
        assert (page.DOCS / picture).stat().st_size < 100_000


def test_trials_run_and_are_not_run_again(folder: Path, results: Results, capsys: pytest.CaptureFixture[str]) -> None:
    """A real experiment of a few steps, end to end; one arm is another library's optimizer, and one trial fails."""
    experiment = read("two", "quick", folder)
    assert runner.run_all(experiment, results, 2, folder / "runs") == []
    assert capsys.readouterr().out.count("validation loss") == 4
    again = Results(results.path)
    assert len(again.rows) == 4 and runner.run_all(experiment, again, 2, folder / "runs") == []
    row = next(iter(View(experiment, again).rows("tuned").values()))
    assert row["tokens"] == 6 * 32 * 64 and len(row["val"]) == 3 and row["cpu_s"] > 0
    assert row["entropy"].keys() >= {"0.self_attn.q_proj"} and 0 < row["entropy"]["0.self_attn.q_proj"] < 1
    assert row["telemetry"][-1]["step"] == 6 and row["telemetry"][-1]["weight_rms"].keys() >= {"q_proj", "down_proj"}
    assert View(experiment, again).losses("tuned")[1] < 5.5
    wrong = Wanted(
        config=experiment.config,
        settings={**experiment.base, "data.source": "bin", "data.train": "none", "data.val": "none", SEED: 1},
        variant="",
        nproc=1,
    )
    found, reason = in_a_process(trial_of(wanted=wrong, work=folder / "runs"), "", 1, {})
    assert found is None and "found no file for 'none'" in reason


def test_a_trial_with_images_leaves_the_row_of_any_other(results: Results, tmp_path: Path) -> None:
    """Both sides start at the same weights, and only the optimizer differs from there."""
    experiment = read("optimizers_resnet", "quick")
    rows = []
    for arm in ("Muon, 3 epochs", "AdamW, 3 epochs"):
        (wanted,) = experiment.tuning(experiment.arms[arm], results.loss) or ()
        trial = trial_of(wanted, tmp_path)
        assert isinstance(trial, images.ImageTrial)
        rows.append(measured(trial.train()))
    muon, adamw = rows
    assert muon["tokens"] == 2 * 64 and muon["parameters"] == 171_114 and muon["skipped_steps"] == 0
    assert [step for step, _ in muon["val"]] == [0, 2] and muon["val_loss"] == muon["val"][-1][1]
    assert muon["val"][0] == adamw["val"][0] and muon["val_loss"] != adamw["val_loss"]
    results.add(wanted, {"settings": wanted.settings, "variant": "", "nproc": 1, **adamw})
    assert Results(results.path).loss(wanted) == adamw["val_loss"]


def test_batches_of_images_are_the_seed_s_and_each_epoch_has_each_image_once() -> None:
    pixels, digits = images.read()
    assert pixels.shape == (1797, 1, 32, 32) and pixels.min() == -1 and 0.9 < pixels.max() <= 1
    assert digits[:5].tolist() == [0, 1, 2, 3, 4] and digits.bincount().min() > 170
    numbered = torch.arange(6.0).reshape(6, 1, 1, 1).expand(6, 1, 32, 32)

    def order(seed: int) -> list[list[int]]:
        train = TrainConfig(steps=4, global_batch=3, seed=seed)
        found = list(images.batches(numbered, torch.arange(6), train))
        for inputs, targets in found:  # whatever the shift, the middle is the image's own
            assert torch.equal(inputs[:, 0, 16, 16], targets.float())
        return [targets.tolist() for _, targets in found]

    first = order(1)
    assert sorted(first[0] + first[1]) == sorted(first[2] + first[3]) == list(range(6))
    assert order(1) == first != order(2)


def test_a_shift_moves_an_image_by_a_pixel_of_the_original_at_most() -> None:
    dot = torch.full((200, 1, 32, 32), -1.0)
    dot[:, 0, 10, 20] = 1.0
    moved = images.shifted(dot, torch.Generator().manual_seed(0))
    found = [tuple((image[0] == 1).nonzero()[0].tolist()) for image in moved]
    assert {y for y, _ in found} == set(range(6, 15)) and {x for _, x in found} == set(range(16, 25))
    assert moved.sum() == dot.sum()


def test_images_held_out_are_not_trained_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pixels, digits = images.read()
    pixels[-images.HELD_OUT :] = math.nan
    monkeypatch.setattr(images, "read", lambda: (pixels, digits))
    experiment = read("optimizers_resnet", "quick")
    (wanted,) = experiment.tuning(experiment.arms["Muon, 10 epochs"], lambda _: None) or ()
    trial = trial_of(wanted, tmp_path)
    assert isinstance(trial, images.ImageTrial)
    row = measured(trial.train())
    assert row["train_loss"] is not None and row["val_loss"] is None


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"train.micro_batch": 8}, r"found train.micro_batch; .* are read; leave the others out"),
        ({"optimizer.name": "lion"}, r"found 'lion'; distmuon or adamw"),
    ],
)
def test_what_a_trial_with_images_does_not_obey_is_refused(changed: dict[str, Any], said: str) -> None:
    experiment = read("optimizers_resnet", "quick")
    wanted = Wanted(config=experiment.config, settings={**experiment.base, **changed}, variant="", nproc=1)
    with pytest.raises(ValueError, match=said):
        trial_of(wanted)
    with pytest.raises(ValueError, match="found variant 'sgd' and 2 processes"):
        trial_of(replace(wanted, variant="sgd", nproc=2))


def test_seeds_are_told_by_their_ends() -> None:
    assert page.consecutive([1, 2, 3, 5, 7, 8]) == ["1 to 3", "5", "7 to 8"]


def test_trials_run_beside_others_of_as_many_processes_seed_by_seed(
    folder: Path, results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One arm with two ranks made every trial of its experiment wait for all others."""
    twice = "twice: {set: {optimizer.name: distmuon, optimizer.lr: {best: tuned, times: 2}}}"
    (folder / "two.yaml").write_text(TINY.replace("same: {", twice + "\n  same: {nproc: 2, "))
    batches = []

    def run(missing: Sequence[Wanted], *_: Any) -> list[tuple[Wanted, dict[str, Any], str]]:
        batches.append([(wanted.nproc, wanted.seed) for wanted in missing])
        of_each = [
            {"settings": wanted.settings, "variant": wanted.variant, "nproc": wanted.nproc} for wanted in missing
        ]
        return [(wanted, {**said, "val_loss": 2.0, "cpu_s": 1.0}, "") for wanted, said in zip(missing, of_each)]

    monkeypatch.setattr(runner, "_run", run)
    assert runner.run_all(read("two", "small", folder), results, 2, folder) == []
    tuning, alone, together = batches
    assert tuning == [(1, seed) for seed in (0, 0, 1, 2, 3)]
    assert alone == [(1, seed) for seed in (1, 1, 2, 2, 3, 3)] and together == [(2, seed) for seed in (1, 2, 3)]


def test_each_shard_alone_is_a_matrix_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows of each of four shards are orthonormal, scaled so that updates keep the RMS of the rule."""
    monkeypatch.setattr(bucket, "orthogonalize", lambda stack, **_: torch.linalg.qr(stack.mT)[0].mT)
    variants.shards_alone(None)  # type: ignore[arg-type]
    found = bucket.orthogonalize(torch.randn(2, 16, 8, dtype=torch.float64))  # type: ignore[call-arg]
    for shard in found.chunk(4, dim=1):  # (2, 4, 8) beside a whole of (2, 16, 8)
        assert torch.allclose(shard @ shard.mT, 0.5 * torch.eye(4, dtype=torch.float64).expand(2, 4, 4))
    assert (found[:, :4] @ found[:, 4:8].mT).abs().max() > 0.01  # two shards know nothing of each other


def test_rates_of_fine_tuning_are_chosen_by_a_seed_that_does_not_count() -> None:
    rows = [
        {"pretrained": "adamw", "tuned": "adamw", "lr": lr, "seed": seed, "prose": loss, "code": 0.0}
        for lr, seed, loss in ((1.0, 0, 3.0), (2.0, 0, 2.0), (1.0, 2, 1.0), (2.0, 2, 4.0), (2.0, 1, 5.0))
    ]
    assert [row["prose"] for row in finetune.counted(rows, pretrained="adamw", tuned="adamw")] == [5.0, 4.0]


def test_the_planned_overhead_is_the_planner_s() -> None:
    """Within a tenth; `python -m experiments.overhead planned` writes it anew."""
    rows = [row for row in overhead.read()["planned"] if row["model"] == overhead.MODELS[0] and row["nodes"] <= 4]
    assert {row["network_gbit"] for row in rows} == set(overhead.NETWORKS)
    for row in rows:
        at = {key: row[key] for key in ("model", "nodes", "tokens")}
        now = overhead.planned_row(network=row["network_gbit"], **at)
        assert now["overhead"] == pytest.approx(row["overhead"], rel=0.1)


def test_overheads_are_those_of_a_round() -> None:
    rows = [
        {"ranks": 2, "tokens": overhead.TOKENS[-1], "processor_ms": {"adamw": 100.0, "distmuon": muon}}
        for muon in (101.0, 102.0, 103.0)
    ]
    found = {"measured": rows, "planned": []}
    assert page.overheads(found, "processor_ms", 2, overhead.TOKENS[-1]) == pytest.approx([0.01, 0.02, 0.03])
    (verdict,) = page._measured_verdicts(found)
    assert verdict.word == CANNOT_TELL and verdict.text.startswith("Measured, 2 ranks, 4,096 tokens")


def test_the_command_runs_one_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    """--quick: a real grid with a variant, tuned and repeated, and the page of it."""
    runner.main(["shards_alone", "--quick", "--jobs", "2"])
    text = capsys.readouterr().out
    assert "4 trials in trials.jsonl" in text and "| each shard alone | 1 | 0.016 |" in text


def _checked() -> list[Experiment]:
    return [
        view.experiment
        for view in page.views_of(Results(RESULTS), page.COMMITTED)
        if view.rows(view.experiment.check["arm"])
    ]


@pytest.mark.slow
@pytest.mark.parametrize("experiment", _checked(), ids=lambda experiment: experiment.name)
def test_a_row_run_again_is_in_its_band(experiment: Experiment, tmp_path: Path) -> None:
    (seed, row), *_ = View(experiment, Results(RESULTS)).rows(experiment.check["arm"]).items()
    wanted = Wanted(config=experiment.config, settings=row["settings"], variant=row["variant"], nproc=row["nproc"])
    assert wanted.seed == seed
    found, reason = in_a_process(trial_of(wanted, tmp_path), wanted.variant, wanted.nproc, {"OMP_NUM_THREADS": "1"})
    assert found is not None, reason
    assert found["val_loss"] == pytest.approx(row["val_loss"], rel=experiment.check["band"])


@pytest.mark.slow
def test_the_quick_suite_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runner.main(["--quick", "--jobs", "2"])
    text = capsys.readouterr().out
    assert "# Experiments" in text and len(read_all("quick")) == len(NAMES)
    claims = [(claim, experiment.arms) for experiment in read_all("quick") for claim in experiment.claims]
    left_out = sum(not set(arms_of(claim)) <= arms.keys() for claim, arms in claims)
    assert text.count("| not run |") == left_out
