"""The whole protocol on a toy model: fresh processes, comparisons, resuming, failures."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from memcompile.errors import MemcompileError
from memcompile.evaluate import METRIC_NAMES, EvaluationSettings, evaluate
from memcompile.evaluate.tasks import ResultStore
from tests.evaluate.toy import OPENER, write_book, write_toy


class _Recorder:
    def __init__(self) -> None:
        self.stages: list[str] = []
        self.updates: list[tuple[int, int]] = []

    def stage(self, name: str) -> None:
        self.stages.append(name)

    def update(self, done: int, total: int) -> None:
        self.updates.append((done, total))


@pytest.fixture
def settings(tmp_path: Path) -> EvaluationSettings:
    return EvaluationSettings(
        prompt_tokens=1200,
        new_tokens=40,
        text=write_book(tmp_path / "book.txt"),
        continuation_tokens=130,
        decode_tokens=8,
        opener=OPENER,
    )


def test_measures_everything_the_report_names(tmp_path: Path, settings: EvaluationSettings) -> None:
    original = write_toy(tmp_path / "original")
    rewritten = write_toy(tmp_path / "rewritten", keep=200)
    progress = _Recorder()
    evaluation = evaluate(original, rewritten, settings, progress=progress)
    assert evaluation.original is not None
    before, after = evaluation.original.as_dict(), evaluation.rewritten.as_dict()
    assert all(after[name] is not None for name in METRIC_NAMES)
    assert before["kl"] is None
    assert before["state_bytes"] == (1200 + 40) * 8
    assert after["state_bytes"] == (200 + 40) * 8
    assert after["state_bytes_peak"] == (1200 + 40) * 8
    assert evaluation.prediction is not None
    assert evaluation.prediction.agrees
    assert evaluation.attribution is not None
    moved = evaluation.attribution.rewritten.moved
    assert moved.state == after["state_bytes"]
    assert evaluation.attribution.predicted_speedup == pytest.approx(
        (moved.total + 1000 * 8) / moved.total, rel=1e-9
    )
    assert after["scored_tokens"] == 2 * 130
    assert 1 << 20 < after["peak_memory_bytes"] < 1 << 32
    assert after["decode_seconds_min"] <= after["decode_seconds_per_token"] <= after["decode_seconds_p90"]
    assert after["load_seconds"] > 0
    assert json.loads(json.dumps(evaluation.as_dict(), allow_nan=False))["rewritten"]["kl"] == after["kl"]
    assert "evaluate rewritten: passkey retrieval" in progress.stages
    assert all(0 < done <= total for done, total in progress.updates)


def test_a_lost_past_shows_in_passkey_and_divergence(tmp_path: Path, settings: EvaluationSettings) -> None:
    evaluation = evaluate(write_toy(tmp_path / "a"), write_toy(tmp_path / "b", keep=140), settings)
    assert evaluation.original is not None
    original, rewritten = evaluation.original, evaluation.rewritten
    assert original.passkey_accuracy == 1.0
    # only what lies inside the last 140 characters survives, and no depth here does
    assert rewritten.passkey_accuracy == 0.0
    assert original.passkey_logprob is not None
    assert rewritten.passkey_logprob is not None
    assert rewritten.passkey_logprob < original.passkey_logprob - 1
    assert rewritten.kl is not None
    assert rewritten.kl > 0.01
    assert rewritten.top1_agreement is not None
    assert 0 < rewritten.top1_agreement < 1


def test_the_identity_has_no_divergence_and_full_agreement(
    tmp_path: Path, settings: EvaluationSettings
) -> None:
    evaluation = evaluate(write_toy(tmp_path / "a"), write_toy(tmp_path / "b"), settings)
    assert evaluation.original is not None
    assert evaluation.rewritten.kl == 0.0
    assert evaluation.rewritten.kl_p99 == 0.0
    assert evaluation.rewritten.top1_agreement == 1.0
    assert evaluation.rewritten.perplexity == evaluation.original.perplexity
    assert evaluation.rewritten.passkey_logprob == evaluation.original.passkey_logprob


def test_perplexity_is_what_one_long_pass_gives(tmp_path: Path, settings: EvaluationSettings) -> None:
    from memcompile.evaluate import scoring
    from memcompile.evaluate.texts import TokenSource, read_text
    from tests.evaluate import toy

    artifact = write_toy(tmp_path / "a")
    assert settings.text is not None
    measured = evaluate(None, artifact, dataclasses.replace(settings, windows=1, passkey_depths=()))
    session = toy.load(str(artifact))
    tokens = TokenSource(session, read_text(settings.text), seed=0).window(0, 1, 1330)
    state = session.new_state(1, 1330, 0)
    session.prefill(state, [tokens[:1]])
    log_probs = scoring.log_probabilities(session.extend(state, tokens[1:-1]))
    losses = scoring.token_losses(log_probs[-130:], np.array(tokens[-130:]))
    assert measured.rewritten.nll_sum == pytest.approx(losses.sum(), abs=2e-3)  # losses are kept to 5 digits
    assert measured.rewritten.perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    assert measured.original is None
    assert measured.rewritten.kl is None


def test_a_second_run_repeats_no_finished_task(tmp_path: Path, settings: EvaluationSettings) -> None:
    log = tmp_path / "opened"
    original = write_toy(tmp_path / "a", log=str(log))
    rewritten = write_toy(tmp_path / "b", log=str(log), keep=300)
    work = tmp_path / "work"
    first = evaluate(original, rewritten, settings, work_dir=work)
    assert len(log.read_text().splitlines()) == 4  # two processes for each
    again = evaluate(original, rewritten, settings, work_dir=work)
    assert len(log.read_text().splitlines()) == 4
    assert again.as_dict() == first.as_dict()
    write_toy(rewritten, log=str(log), keep=301)
    evaluate(original, rewritten, settings, work_dir=work)
    assert len(log.read_text().splitlines()) == 6  # the original's results still hold


def test_lost_log_probabilities_are_measured_again(tmp_path: Path, settings: EvaluationSettings) -> None:
    original = write_toy(tmp_path / "a")
    work = tmp_path / "work"
    settings = dataclasses.replace(settings, passkey_depths=())
    evaluate(original, write_toy(tmp_path / "b", keep=300), settings, work_dir=work)
    for saved in work.glob("*log-probabilities.npy"):
        saved.unlink()
    evaluation = evaluate(original, write_toy(tmp_path / "c", keep=200), settings, work_dir=work)
    assert evaluation.rewritten.kl is not None


def test_a_torn_last_line_of_results_is_ignored(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "results.jsonl")
    store.append("a", "cost", {"x": 1})
    with store.path.open("a") as stream:
        stream.write('{"key": "b", "resu')
    store.append("c", "cost", {"x": 3})
    assert store.read() == {"a": {"x": 1}, "c": {"x": 3}}


def test_batches_are_timed_together(tmp_path: Path, settings: EvaluationSettings) -> None:
    settings = dataclasses.replace(settings, batch=3, windows=1, passkey_depths=())
    evaluation = evaluate(None, write_toy(tmp_path / "a"), settings)
    assert evaluation.rewritten.state_bytes == 3 * (1200 + 40) * 8
    assert evaluation.rewritten.prefill_seconds_min == evaluation.rewritten.prefill_seconds_max


def test_crossover_measures_shorter_prompts(tmp_path: Path, settings: EvaluationSettings) -> None:
    settings = dataclasses.replace(settings, crossover=True, windows=1, passkey_depths=())
    evaluation = evaluate(write_toy(tmp_path / "a"), write_toy(tmp_path / "b", keep=64), settings)
    lengths = [point["prompt_tokens"] for point in evaluation.rewritten.lengths]
    assert sorted(lengths) == [150, 450, 1200]
    assert [found.quantity for found in evaluation.crossovers] == ["prefill", "decode", "request"]


def test_without_a_tokenizer_random_tokens_are_used_and_said(
    tmp_path: Path, settings: EvaluationSettings
) -> None:
    settings = dataclasses.replace(settings, windows=1)
    original = write_toy(tmp_path / "a", tokenizer=False)
    evaluation = evaluate(original, write_toy(tmp_path / "b", tokenizer=False, keep=64), settings)
    assert evaluation.rewritten.kl is not None
    assert evaluation.rewritten.passkey_accuracy is None
    assert "random tokens" in evaluation.notes[0]
    assert evaluation.notes[1] == "passkey retrieval was left out: the artifact has no tokenizer"


def test_passkeys_need_no_text(tmp_path: Path, settings: EvaluationSettings) -> None:
    without = dataclasses.replace(settings, text=None, windows=1, passkey_depths=(0.5,))
    evaluation = evaluate(None, write_toy(tmp_path / "a"), without)
    assert evaluation.rewritten.passkey_accuracy == 1.0
    assert [note.partition(":")[0] for note in evaluation.notes] == ["no text or no tokenizer"]


def test_a_prompt_too_short_for_a_haystack_is_said(tmp_path: Path, settings: EvaluationSettings) -> None:
    settings = dataclasses.replace(settings, prompt_tokens=200, windows=1)
    evaluation = evaluate(None, write_toy(tmp_path / "a"), settings)
    assert evaluation.rewritten.passkey_accuracy is None
    assert evaluation.notes == ("passkey retrieval was left out: a prompt of 200 tokens is too short",)


def test_models_called_once_are_compared_by_their_outputs(tmp_path: Path) -> None:
    settings = EvaluationSettings(prompt_tokens=64, opener=OPENER)
    original = write_toy(tmp_path / "a", causal=False)
    evaluation = evaluate(original, write_toy(tmp_path / "b", causal=False, sharpness=8.8), settings)
    assert evaluation.rewritten.output_difference == pytest.approx(0.1, rel=1e-3)
    assert evaluation.rewritten.prefill_seconds is not None
    assert evaluation.rewritten.state_bytes is None


def test_refuses_a_prompt_without_room_in_the_positions(tmp_path: Path, settings: EvaluationSettings) -> None:
    settings = dataclasses.replace(settings, prompt_tokens=4096)
    with pytest.raises(MemcompileError, match="4096") as caught:
        evaluate(None, write_toy(tmp_path / "a"), settings)
    assert caught.value.code == "MC130"


def test_a_continuation_is_cut_at_the_last_position(tmp_path: Path, settings: EvaluationSettings) -> None:
    settings = dataclasses.replace(settings, prompt_tokens=4000, windows=1, passkey_depths=(), new_tokens=8)
    assert evaluate(None, write_toy(tmp_path / "a"), settings).rewritten.scored_tokens == 96


@pytest.mark.parametrize(
    ("fail", "code", "words"),
    [
        ("error", "MC503", "model.onnx changed"),
        ("crash", "MC402", "the toy broke"),
        ("kill", "MC402", "signal 9"),
    ],
)
def test_a_failing_process_says_why(
    tmp_path: Path, settings: EvaluationSettings, fail: str, code: str, words: str
) -> None:
    with pytest.raises(MemcompileError, match=words) as caught:
        evaluate(None, write_toy(tmp_path / "a", fail=fail), settings)
    assert caught.value.code == code


def test_a_missing_artifact_is_named(tmp_path: Path, settings: EvaluationSettings) -> None:
    with pytest.raises(MemcompileError, match="nothing-here") as caught:
        evaluate(None, tmp_path / "nothing-here", settings)
    assert caught.value.code == "MC501"


def test_quick_settings_do_less_of_the_same() -> None:
    quick = EvaluationSettings(crossover=True).quick()
    assert (quick.windows, quick.passkey_depths, quick.decode_tokens) == (1, (0.1, 0.5, 0.9), 32)
    assert not quick.crossover
    assert quick.prompt_tokens == EvaluationSettings().prompt_tokens


@pytest.mark.parametrize(("tokens", "windows"), [(None, 4), (100, 1), (4512, 1), (9024, 2), (10**6, 4)])
def test_the_text_budget_bounds_the_windows(tokens: int | None, windows: int) -> None:
    settings = EvaluationSettings(prompt_tokens=4000, continuation_tokens=512, windows=4, text_tokens=tokens)
    assert settings.windows_in_budget() == windows
