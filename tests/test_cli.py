"""The command line as a person meets it: another process, its output and its exit status."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def flashdecpp(*arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flashdecpp", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )


def complaint(result: subprocess.CompletedProcess[str]) -> str:
    """The one line that a failed run leaves on stderr."""
    assert result.returncode == 1, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_help_explains_itself() -> None:
    result = flashdecpp("--help")
    assert result.returncode == 0
    for command in ("generate", "chat", "calibrate", "info"):
        assert command in result.stdout


@pytest.mark.parametrize(
    ("command", "settings"),
    [("generate", ["--no-cuda-graphs", "--batch-invariant"]), ("chat", ["--no-cuda-graphs"])],
)
def test_help_of_a_command_has_the_settings_of_its_steps(command, settings) -> None:
    result = flashdecpp(command, "--help", COLUMNS="200")
    assert result.returncode == 0
    for setting in settings:
        assert setting in result.stdout


def test_info_names_builds_devices_and_kernels() -> None:
    result = flashdecpp("info")
    assert result.returncode == 0, result.stderr
    for heading in ("Built", "Loaded", "Devices", "Kernels"):
        assert heading in result.stdout.splitlines()
    assert "cpu: yes" in result.stdout
    assert "linear(auto) on the CPU" in result.stdout


def test_info_shows_the_instruction_set_that_runs() -> None:
    result = flashdecpp("info", FLASHDECPP_CPU_ISA="baseline")
    assert "kernels for baseline" in result.stdout


def test_an_empty_prompt_is_one_line() -> None:
    assert complaint(flashdecpp("generate", stdin="")) == "flashdecpp: the prompt is empty"


def test_a_prompt_and_a_file_exclude_each_other(tmp_path: Path) -> None:
    assert "not both" in complaint(flashdecpp("generate", "hello", "--file", str(tmp_path / "prompt.txt")))


def test_a_missing_model_is_one_line(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere"
    assert str(missing) in complaint(flashdecpp("generate", "hello", "--model", str(missing)))


def test_bad_sampling_parameters_are_one_line() -> None:
    assert "top_p" in complaint(flashdecpp("generate", "hello", "--top-p", "0"))


@pytest.mark.demo
def test_generate_streams_the_answer_and_reports_on_stderr() -> None:
    result = flashdecpp(
        "generate",
        "The capital of France is",
        "-n",
        "3",
        "--dtype",
        "float32",
        "--device",
        "cpu",
        "--phi",
        "none",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(" Paris.")
    report = result.stderr.strip().splitlines()[-1]
    for part in ("first after", "tokens/s", "int4 + int8 weights", "peak memory", "online softmax"):
        assert part in report
    assert "CUDA graphs" not in report and "batch-invariant" not in report


@pytest.mark.demo
def test_steps_that_are_slower_by_choice_are_reported() -> None:
    settings = ["--no-cuda-graphs", "--batch-invariant", "--device", "cpu"]
    result = flashdecpp("generate", "The capital of France is", "-n", "3", *settings)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(" Paris.")
    assert "no CUDA graphs, batch-invariant, " in result.stderr.strip().splitlines()[-1]


@pytest.mark.demo
def test_a_batch_invariant_answer_is_the_same_alone_and_beside_others() -> None:
    """Others that begin like it included: their beginning isn't taken from the cache."""
    prompt = "The capital of France is a city that lies on the river Seine, and the people who live there"
    settings = ["--batch-invariant", "--lines", "--json", "-n", "8", "--device", "cpu"]
    results = [flashdecpp("generate", *settings, stdin=f"{prompt}\n" * count) for count in (1, 3)]
    alone, *beside = (json.loads(line)["token_ids"] for r in results for line in r.stdout.splitlines())
    assert len(beside) == 3 and all(ids == alone for ids in beside)
    assert not any("found in the cache" in result.stderr for result in results)


@pytest.mark.demo
def test_json_is_one_object_a_prompt() -> None:
    prompts = "The capital of France is\nThe capital of Italy is\n"
    result = flashdecpp("generate", "--lines", "--json", "-n", "4", "--device", "cpu", stdin=prompts)
    assert result.returncode == 0, result.stderr
    objects = [json.loads(line) for line in result.stdout.splitlines()]
    assert [found["prompt"] for found in objects] == prompts.splitlines()
    for found in objects:
        assert set(found) == {"prompt", "text", "token_ids", "finish_reason", "timings"}
        assert len(found["token_ids"]) == 4
        assert found["finish_reason"] == "length"
        assert found["timings"]["time_to_first_token_s"] > 0


@pytest.mark.demo
def test_chat_answers_until_the_input_ends() -> None:
    result = flashdecpp("chat", "-n", "4", "--device", "cpu", stdin="Hello!\n/new\nHi again!\n")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("tokens/s") == 2
