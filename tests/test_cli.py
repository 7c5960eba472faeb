"""The command line as users see it: its streams and exit status, mostly in a process of its own."""

import errno
import io
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import pytest
import torch
from runner_models import byte_tokens, save_model

import flashdecpp as package
from flashdecpp import Completion, Piece, SamplingParams
from flashdecpp._folders import cache_folder
from flashdecpp.cli import main
from flashdecpp.engine.config import EngineConfig
from flashdecpp.engine.logprobs import TokenLogprob


def interruptible() -> None:
    """For a child process, since a shell ignores interrupts for tests that run in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def flashdecpp(*arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flashdecpp", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        preexec_fn=interruptible,
    )


def complaint(result: subprocess.CompletedProcess[str]) -> str:
    """The one line that a failed run leaves on stderr."""
    assert result.returncode == 1, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


LIGHT = [["--help"], ["--version"], ["generate", "--help"], ["tune", "--help"], ["--show-completion", "bash"]]


@pytest.mark.parametrize("arguments", LIGHT, ids=" ".join)
def test_what_computes_nothing_imports_no_torch(tmp_path: Path, arguments: list[str]) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('torch was imported')\n")
    paths = [str(tmp_path), str(Path(package.__file__).parents[1])]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = flashdecpp(
        *arguments, PYTHONPATH=os.pathsep.join(paths), _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1"
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 0, result.stderr
    assert (after.ru_utime - before.ru_utime) + (after.ru_stime - before.ru_stime) < 1.0


def test_the_version_is_the_packages() -> None:
    assert flashdecpp("--version").stdout == f"flashdecpp {package.__version__}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_a_shell_completes_commands_and_options(shell: str) -> None:
    asked = {
        "bash": {"COMP_WORDS": "flashdecpp cal", "COMP_CWORD": "1"},
        "zsh": {"_TYPER_COMPLETE_ARGS": "flashdecpp cal"},
    }
    code = "import sys; sys.argv = ['flashdecpp']; from flashdecpp.cli import main; main()"
    environment = {**os.environ, **asked[shell], "_FLASHDECPP_COMPLETE": f"complete_{shell}"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "calibrate" in result.stdout and "generate" not in result.stdout, result.stderr


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


def test_an_instruction_set_that_cannot_run_is_one_line() -> None:
    said = complaint(flashdecpp("generate", "hello", FLASHDECPP_CPU_ISA="mmx"))
    assert said.startswith("flashdecpp: FLASHDECPP_CPU_ISA is 'mmx'") and "built are baseline" in said


def test_an_empty_prompt_is_one_line() -> None:
    assert "the prompt is empty: give one" in complaint(flashdecpp("generate", stdin=""))


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
    """Even next to prompts with the same beginning, which is then not read from the cache."""
    prompt = "The capital of France is a city that lies on the river Seine, and the people who live there"
    settings = ["--batch-invariant", "--lines", "--json", "-n", "8", "--device", "cpu"]
    results = [flashdecpp("generate", *settings, stdin=f"{prompt}\n" * count) for count in (1, 3)]
    alone, *beside = (json.loads(line)["token_ids"] for r in results for line in r.stdout.splitlines())
    assert len(beside) == 3 and all(ids == alone for ids in beside)
    assert not any("from the cache" in result.stderr for result in results)


@pytest.mark.demo
def test_json_is_one_object_a_prompt() -> None:
    prompts = "The capital of France is\nThe capital of Italy is\n"
    result = flashdecpp("generate", "--lines", "--json", "-n", "4", "--device", "cpu", stdin=prompts)
    assert result.returncode == 0, result.stderr
    objects = [json.loads(line) for line in result.stdout.splitlines()]
    assert [found["prompt"] for found in objects] == prompts.splitlines()
    for found in objects:
        which = {"index", "sample", "seed", "counts", "stop_match"}
        assert set(found) == {"prompt", "text", "token_ids", "finish_reason", "timings"} | which
        assert len(found["token_ids"]) == 4
        assert found["finish_reason"] == "length"
        assert found["timings"]["time_to_first_token_s"] > 0


@pytest.mark.demo
def test_chat_answers_until_the_input_ends() -> None:
    result = flashdecpp("chat", "-n", "4", "--device", "cpu", stdin="Hello!\n/new\nHi again!\n")
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("tokens/s") == 2


# --------------------------------------------------- inside this process, with streams of the test


@dataclass
class Result:
    status: int
    output: bytes
    errors: str

    @property
    def objects(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.decode().split("\n") if line]

    @property
    def complaint(self) -> str:
        """The one line that a failed run leaves on stderr."""
        assert self.status == 1, self.errors
        assert self.output == b""
        (line,) = self.errors.splitlines()
        assert line.startswith("flashdecpp: ") and "[Errno" not in line
        return line


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


def run(
    *arguments: str,
    stdin: bytes | None = b"",
    encoding: str = "utf-8",
    output: io.BytesIO | None = None,
    typed: bool = False,
) -> Result:
    """The command line with these streams. `typed`: standard input is a terminal, or closed if None."""
    output, errors = output or io.BytesIO(), io.StringIO()
    source = (Terminal if typed else io.TextIOWrapper)(io.BytesIO(stdin or b""), "utf-8")
    streams = {
        "stdin": None if stdin is None else source,
        "stdout": io.TextIOWrapper(output, encoding, write_through=True),
        "stderr": errors,
        "argv": ["flashdecpp", *arguments],
    }
    with mock.patch.multiple(sys, **streams):
        try:
            main()
            status = 0
        except SystemExit as end:
            status = end.code or 0
    return Result(status, output.getvalue(), errors.getvalue())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose answers are random bytes."""
    folder = tmp_path_factory.mktemp("llama")
    save_model(folder)
    return folder


@pytest.fixture
def generate(folder: Path) -> Callable[..., Result]:
    options = ("--model", str(folder), "--device", "cpu", "--dtype", "float32", "-n", "3")
    return lambda *arguments, **streams: run("generate", *options, *arguments, **streams)


class Puppet:
    """Replaces the LLM: records its calls and returns prepared answers."""

    name, device, dtype, stats = "puppet", torch.device("cpu"), torch.float32, None
    answers: Sequence[Any] = ()  # completions or pieces, and between them errors and functions to call
    asked: ClassVar[list[tuple[Any, ...]]] = []

    def __init__(self, model: str, **settings: Any) -> None:
        self.asked.append(("LLM", settings))
        self.tokenizer = self

    def encode_chat(self, messages: list[dict[str, str]], tools: Any = None) -> list[int]:
        self.asked.append(("chat", messages, tools))
        return [1]

    def _answers(self) -> Iterator[Any]:
        for answer in self.answers:
            if isinstance(answer, BaseException):
                raise answer
            elif callable(answer):
                answer()
            else:
                yield answer

    def completions(self, prompts: Any, params: SamplingParams, *, progress: bool = False) -> Iterator[Any]:
        self.asked.append(("completions", prompts, params))
        return self._answers()

    def stream(self, prompt: Any, params: SamplingParams) -> Iterator[Any]:
        self.asked.append(("stream", prompt, params))
        return self._answers()


@pytest.fixture
def puppet(monkeypatch: pytest.MonkeyPatch) -> type[Puppet]:
    monkeypatch.setattr(Puppet, "asked", [])
    monkeypatch.setattr(Puppet, "answers", ())
    monkeypatch.setattr(package, "LLM", Puppet)
    return Puppet


def completion(text: str, **values: Any) -> Completion:
    shared = {"prompt": "", "token_ids": [5], "prompt_token_ids": [1, 2], "finish_reason": "length"}
    timings = {"time_to_first_token": 0.5, "tokens_per_second": 2.0}
    return Completion(text=text, **{**shared, **timings, **values})


# ---- text in


@pytest.mark.parametrize(
    ("data", "prompts"),
    [
        ("a\u2028b\nc\x0cd\x1ce\n\n  \nf\x85g\n".encode(), ["a\u2028b", "c\x0cd\x1ce", "f\x85g"]),
        (b"one\r\ntwo\rtwo\r\n\r\nthree", ["one", "two\rtwo", "three"]),
        (b"\xef\xbb\xbfwith a mark\n", ["with a mark"]),
        (b"caf\xe9\n\xff\xfe\nfine\n", ["caf\ufffd", "\ufffd\ufffd", "fine"]),
    ],
    ids=["separators", "crlf", "byte order mark", "no utf-8"],
)
@pytest.mark.parametrize("source", ["standard input", "file"])
def test_lines_end_at_newlines_and_bytes_that_are_no_text_are_replaced(
    generate, tmp_path, data, prompts, source
) -> None:
    (tmp_path / "prompts.txt").write_bytes(data)
    given = ["--file", str(tmp_path / "prompts.txt")] if source == "file" else []
    result = generate("--lines", "--json", *given, stdin=b"" if given else data)
    assert result.status == 0, result.errors
    by_index = sorted(result.objects, key=lambda found: found["index"])
    assert [found["prompt"] for found in by_index] == prompts


def test_arguments_that_are_no_text_are_replaced(puppet) -> None:
    texts = ["caf\udce9", "--stop", "\udcff!", "--bad-word", "b\udc80"]
    assert run("generate", *texts).status == 0
    _, prompt, params = puppet.asked[-1]
    assert (prompt, params.stop, params.bad_words) == ("caf\ufffd", ("\ufffd!",), ("b\ufffd",))


def test_standard_input_that_is_closed_is_one_line() -> None:
    assert "standard input is closed" in run("generate", stdin=None).complaint


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["generate", "--file", "{missing}"], "{missing}: no such file"),
        (["generate", "--file", "{folder}"], "{folder}: is a directory"),
        (["generate", "hi", "--chat", "--tools", "{missing}"], "{missing}: no such file"),
        (["generate", "hi", "--chat", "--tools", "{broken}"], "{broken}: --tools must be JSON"),
        (["generate", "hi", "--chat", "--tools", "{number}"], "a JSON list of functions, got a int"),
        (["generate", "hi", "--tools", "{number}"], "--tools needs --chat"),
        (["generate", "hi", "--system", "short"], "--system needs --chat"),
        (["generate", "hi", "--max-batch", "0", "--model", "{folder}"], "max_batch must be"),
        (["generate", "hi", "--cache-tokens", "0", "--model", "{folder}"], "cache_tokens must be"),
        (["generate", "hi", "--top-p", "2"], "top_p must be"),
        (["generate", "hi", "-t", "-1"], "temperature must be"),
        (["generate", "hi", "--top-k", "3000000000"], "top_k must be"),
        (["generate", "hi", "-n", "0"], "max_tokens must be"),
        (["generate", "hi", "-n", "3", "--min-tokens", "4"], "min_tokens must be"),
        (["generate", "hi", "--samples", "0"], "n must be"),
        (["generate", "hi", "--seed", "-1"], "seed must be"),
        (["generate", "hi", "--stop", ""], "stop must be"),
        (["generate", "hi", "--logit-bias", "seven=1"], "--logit-bias must be ID=VALUE"),
        (["generate", "hi", "--logit-bias", "7"], "--logit-bias must be ID=VALUE"),
        (["generate", "hi", "--logit-bias", "7=nan"], r"logit_bias[7] must be"),
        (["generate", "hi", "--logprobs", "1"], "need --json"),
        (["generate", "hi", "--json", "--logprobs", "-1"], "logprobs must be"),
        (["chat", "--min-p", "2"], "min_p must be"),
        (["info", "--shapes", "1125899906842624,8"], "N and K of a weight must be from 1 to"),
        (["info", "--shapes", "9" * 5000 + ",8"], "--shapes must be pairs"),
    ],
    ids=lambda value: " ".join(value)[:50] if isinstance(value, list) else "",
)
def test_what_can_not_be_is_one_line(tmp_path, arguments, reason) -> None:
    names = {"missing": tmp_path / "missing", "folder": tmp_path}
    for name, text in (("broken", "[1, 2"), ("number", "5")):
        names[name] = tmp_path / name
        names[name].write_text(text)
    assert reason.format(**names) in run(*(argument.format(**names) for argument in arguments)).complaint


def test_every_option_reaches_the_runner(puppet) -> None:
    options = "-n 9 -t 0.5 --top-k 7 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.1 --presence-penalty 0.2"
    options += " --frequency-penalty -0.3 --logit-bias 5=2.5 --logit-bias 6=-inf --bad-word no --stop end"
    options += (
        " --stop . --stop-token-id 3 --stop-token-id 4 --min-tokens 2 --ignore-eos --seed 1 --samples 2"
    )
    options += " --logprobs 2 --prompt-logprobs 0 --keep-special-tokens --json --no-generation-config"
    options += " --max-len 90 --max-batch 3 --cache-tokens 70"
    assert run("generate", "hi", *options.split()).status == 0
    expected = SamplingParams(
        max_tokens=9,
        temperature=0.5,
        top_k=7,
        top_p=0.9,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=-0.3,
        logit_bias={5: 2.5, 6: -math.inf},
        bad_words=["no"],
        stop=["end", "."],
        stop_token_ids=[3, 4],
        min_tokens=2,
        ignore_eos=True,
        seed=1,
        n=2,
        logprobs=2,
        prompt_logprobs=0,
        skip_special_tokens=False,
    )
    (_, settings), (_, prompts, params) = puppet.asked
    assert (prompts, params) == (["hi"], expected)
    assert settings["generation_config"] is False
    assert (settings["max_len"], settings["max_batch"], settings["cache_tokens"]) == (90, 3, 70)


def test_what_is_not_given_is_the_models_own(puppet) -> None:
    assert run("generate", "hi").status == 0
    (_, settings), (_, _, params) = puppet.asked
    assert params == SamplingParams()
    assert settings["max_batch"] == EngineConfig().max_batch
    assert settings["generation_config"] is True


def test_tools_reach_the_chat_template(puppet, tmp_path) -> None:
    tools = [{"type": "function", "function": {"name": "weather"}}]
    (tmp_path / "tools.json").write_text(json.dumps(tools))
    assert run("generate", "Rain?", "--chat", "--tools", str(tmp_path / "tools.json")).status == 0
    assert ("chat", [{"role": "user", "content": "Rain?"}], tools) in puppet.asked


def test_a_system_message_opens_the_chat(puppet) -> None:
    assert run("generate", "Rain?", "--chat", "--system", "Be brief.").status == 0
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Rain?"}]
    assert ("chat", messages, None) in puppet.asked


# ---- text out


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_can_not_print_everything_gets_replacements(generate, encoding) -> None:
    """Almost no byte that this model generates is a character by itself."""
    expected = generate("x", "-n", "40").output.decode()
    assert "\ufffd" in expected
    result = generate("x", "-n", "40", encoding=encoding)
    assert result.status == 0, result.errors
    assert result.output == expected.encode(encoding, "replace")


def test_json_loses_nothing_on_any_terminal(generate) -> None:
    text = "na\u00efve \U0001f680"
    plain, ascii_only = (generate(text, "--json", encoding=encoding) for encoding in ("utf-8", "ascii"))
    assert text in plain.output.decode()
    assert ascii_only.objects[0]["prompt"] == text
    assert ascii_only.objects[0]["text"] == plain.objects[0]["text"]


def test_an_object_says_which_answer_it_is_and_how_to_get_it_again(generate) -> None:
    sampled = ["--json", "-t", "1", "-n", "6", "--ignore-eos"]
    result = generate("--lines", "--samples", "2", *sampled, stdin=b"one\ntwo two\n")
    assert result.status == 0, result.errors
    found = {(each["index"], each["sample"]): each for each in result.objects}
    assert sorted(found) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    for (index, _), answer in found.items():
        assert answer["prompt"] == ("one", "two two")[index]
        assert answer["finish_reason"] == "length" and answer["stop_match"] is None
        counts = {
            "prompt_tokens": 1 + len(answer["prompt"]),
            "generated_tokens": 6,
            "cached_prompt_tokens": 0,
        }
        assert answer["counts"] == counts
        assert answer["timings"]["tokens_per_second"] > 0
    wanted = found[1, 1]
    again = generate("two two", *sampled, "--seed", str(wanted["seed"]))
    assert again.objects[0]["token_ids"] == wanted["token_ids"]


def test_what_ended_an_answer_and_its_log_probabilities(generate) -> None:
    plain = generate("x", "--json", "--ignore-eos", "-n", "8").objects[0]
    assert "logprobs" not in plain and "prompt_logprobs" not in plain
    token = plain["token_ids"][4]
    asked = ["--stop-token-id", str(token), "--logprobs", "2", "--prompt-logprobs", "0"]
    (stopped,) = generate("x", "--json", "--ignore-eos", "-n", "8", *asked).objects
    first = plain["token_ids"].index(token)
    assert stopped["token_ids"] == plain["token_ids"][:first]
    assert (stopped["finish_reason"], stopped["stop_match"]) == ("stop", token)
    for place, likely in zip(stopped["token_ids"], stopped["logprobs"], strict=True):
        assert likely["token_id"] == place == likely["top"][0][0]
        assert likely["logprob"] == pytest.approx(likely["top"][0][1])
    assert [token and token["token_id"] for token in stopped["prompt_logprobs"]] == [
        None,
        byte_tokens().index("x"),
    ]


def test_an_infinity_is_null_in_json(puppet) -> None:
    puppet.answers = [completion("a", logprobs=[TokenLogprob(5, -0.1, ((5, -0.1), (6, -math.inf)))])]
    (found,) = run("generate", "x", "--json").objects
    assert found["logprobs"][0]["top"] == [[5, -0.1], [6, None]]


@pytest.mark.parametrize(("arguments", "shown"), [(["--json"], [1, 2, 3]), ([], [0, 1, 3])])
def test_an_answer_is_out_before_the_next_has_ended(puppet, arguments, shown) -> None:
    """Texts only, in the order of their prompts."""
    output, seen = io.BytesIO(), []
    look = lambda: seen.append(output.getvalue().count(b"answer"))  # noqa: E731
    for index in (2, 0, 1):
        puppet.answers = [*puppet.answers, completion(f"answer {index}", index=index), look]
    result = run("generate", "--lines", *arguments, stdin=b"a\nb\nc", output=output)
    assert (result.status, seen) == (0, shown)
    if not arguments:
        assert result.output.decode().splitlines() == ["answer 0", "answer 1", "answer 2"]


def test_threads_are_torchs(puppet) -> None:
    before, seen = torch.get_num_threads(), []
    puppet.answers = [lambda: seen.append(torch.get_num_threads())]
    try:
        assert run("generate", "hi", "--threads", "3").status == 0
    finally:
        torch.set_num_threads(before)
    assert seen == [3]


def test_quiet_leaves_only_the_answer(generate) -> None:
    loud, quiet = generate("x"), generate("x", "--quiet")
    assert (quiet.status, quiet.output, quiet.errors) == (0, loud.output, "")
    assert "tokens/s" in loud.errors


def test_quiet_does_not_hide_errors(talk, tmp_path) -> None:
    assert "no such file" in run("generate", "--quiet", "--file", str(tmp_path / "missing")).complaint
    result = talk(b"far too long " * 9 + b"\nagain\n", quiet=True)
    assert result.status == 0 and result.output
    (line,) = result.errors.splitlines()
    assert line.startswith("flashdecpp: ") and line.endswith("; /new starts over")


# ---- how a run ends


@pytest.mark.parametrize("arguments", [["--json", "--lines"], ["--lines"], []])
def test_after_an_interrupt_what_was_answered_is_there(puppet, arguments) -> None:
    several = "--lines" in arguments
    answer = completion("so far") if several else Piece("so far", 5)
    puppet.answers = [answer, KeyboardInterrupt()]
    result = run("generate", *arguments, stdin=b"a\nb" if several else b"a")
    assert result.status == 130
    assert b"so far" in result.output and result.output.endswith(b"\n")
    assert result.errors == ""


class Closed(io.BytesIO):
    """A stream that cannot be written."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def write(self, data: bytes) -> int:
        raise OSError(self.number, os.strerror(self.number))


def test_a_reader_that_has_enough_ends_the_run_quietly(puppet) -> None:
    puppet.answers = [Piece("more", 5), Piece("and more", 6)]
    result = run("generate", "a", output=Closed(errno.EPIPE))
    assert (result.status, result.errors) == (0, "")


def test_a_full_disk_is_one_line(puppet) -> None:
    puppet.answers = [Piece("more", 5), Piece("and more", 6)]
    assert (
        run("generate", "a", output=Closed(errno.ENOSPC)).complaint == "flashdecpp: no space left on device"
    )


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory.\nTried"), MemoryError()])
def test_memory_that_runs_out_is_one_line(puppet, error) -> None:
    puppet.answers = [error]
    assert "emory" in run("generate", "a").complaint


LONG = ["generate", "x", "-n", "30000", "--ignore-eos", "--device", "cpu", "--dtype", "float32", "--model"]


@pytest.fixture(scope="module")
def long_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The context allows an answer that takes minutes."""
    folder = tmp_path_factory.mktemp("long")
    save_model(folder, max_position_embeddings=32768, num_hidden_layers=1)
    return folder


@pytest.mark.parametrize("how", ["Ctrl-C", "closed pipe"])
def test_a_process_that_is_cut_short(long_folder: Path, how: str) -> None:
    command = [sys.executable, "-m", "flashdecpp", *LONG, str(long_folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, preexec_fn=interruptible) as process:
        assert process.stdout.read(4)
        if how == "Ctrl-C":
            process.send_signal(signal.SIGINT)
            process.stdout.read()
        else:
            process.stdout.close()
        errors = process.stderr.read().decode()
        assert process.wait() == (130 if how == "Ctrl-C" else 0)
    lines = errors.splitlines()
    assert [line.startswith("[long") for line in lines] == ([True] if how == "Ctrl-C" else []), errors


def test_an_interrupt_while_torch_is_imported_is_quiet(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), 2)\ntime.sleep(9)\n")
    paths = [str(tmp_path), str(Path(package.__file__).parents[1])]
    result = flashdecpp("info", PYTHONPATH=os.pathsep.join(paths))
    assert (result.returncode, result.stderr) == (-signal.SIGINT, "")


@pytest.mark.parametrize("delay", [0.3, 0.8, 1.6, 2.4])
@pytest.mark.parametrize("entry", ["python -m flashdecpp", "flashdecpp"])
def test_an_interrupt_is_quiet_whenever_it_comes(long_folder: Path, entry: str, delay: float) -> None:
    """From when the package is imported, torch is next, to after the first token."""
    code = "import sys; sys.argv[0] = 'flashdecpp'; from flashdecpp.cli import main; main()"
    program = ["-m", "flashdecpp"] if entry.startswith("python") else ["-c", code]
    with subprocess.Popen(
        [sys.executable, *program, *LONG, str(long_folder)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=interruptible,
    ) as process:
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        errors = process.stderr.read()
        assert process.wait() in (130, -signal.SIGINT)
    assert "Traceback" not in errors and "KeyboardInterrupt" not in errors


# ---- chat


@pytest.fixture
def talk(folder: Path) -> Callable[..., Result]:
    """With room for 64 tokens."""
    options = ["--model", str(folder), "--device", "cpu", "--dtype", "float32", "-n", "8", "--ignore-eos"]
    options += ["--cache-tokens", "64"]
    return lambda stdin, quiet=False, **streams: run(
        "chat", *options, *(["--quiet"] if quiet else []), stdin=stdin, **streams
    )


def answers(result: Result) -> int:
    return result.errors.count("tokens/s")


def test_a_conversation_goes_on_after_a_turn_that_does_not_fit(talk) -> None:
    result = talk(b"hi\n" + b"far too long " * 9 + b"\nagain\n")
    assert result.status == 0, result.errors
    assert answers(result) == 2
    (complaint,) = [line for line in result.errors.splitlines() if line.startswith("flashdecpp: ")]
    assert complaint.endswith("; /new starts over")


def test_a_conversation_that_is_full_starts_over(talk) -> None:
    result = talk(b"hi there\n" * 3 + b"/new\nhi there\n")
    assert result.status == 0
    assert answers(result) == 2 and result.errors.count("/new starts over") == 2


def test_turns_that_are_no_text_are_answered(talk) -> None:
    result = talk(b"caf\xe9\n", encoding="ascii")
    assert (result.status, answers(result)) == (0, 1)


@pytest.mark.parametrize("typed", [False, True])
def test_the_sign_of_a_turn_never_gets_into_what_is_piped(talk, typed) -> None:
    result = talk(b"hi\nhi\n", typed=typed)
    assert result.status == 0
    signs = [line for line in result.errors.splitlines() if line.startswith("> ")]
    assert len(signs) == (3 if typed else 0)
    assert not any(line.startswith(b"> ") for line in result.output.splitlines())


def test_an_interrupt_ends_a_conversation_that_nobody_types(puppet, monkeypatch) -> None:
    monkeypatch.setattr("builtins.input", mock.Mock(side_effect=KeyboardInterrupt))
    assert run("chat", stdin=b"hi\n").status == 130


# ---- info, and what surrounds the package


def test_info_lists_spoiled_tables(tmp_path: Path) -> None:
    tables = tmp_path / "tables"
    (tables / "folder.json").mkdir(parents=True)
    spoiled = {"deep": "[" * 100_000, "empty": "", "number": "5", "bytes": "\0\1", "lone": '{"version": 9}'}
    for name, text in spoiled.items():
        (tables / f"{name}.json").write_text(text)
    os.mkfifo(tables / "pipe.json")
    result = flashdecpp("info", FLASHDECPP_CACHE=str(tmp_path), PYTHONWARNINGS="ignore")
    assert result.returncode == 0, result.stderr
    for name in (*spoiled, "pipe", "folder"):
        assert result.stdout.count(f"not used: {tables / name}.json") == 1


def test_a_clone_that_was_not_built_gives_way_to_the_installed_package(tmp_path: Path) -> None:
    folder = Path(package.__file__).parent
    ignored = shutil.ignore_patterns("lib", "*.so", "__pycache__")
    shutil.copytree(folder, tmp_path / "flashdecpp", ignore=ignored)
    code = """
import sys
try:
    import flashdecpp
except ImportError as error:
    print(error)
sys.path.append(sys.argv[1])
import flashdecpp, torch
print(flashdecpp.ops.__file__, torch.ops.flashdecpp.linear)
"""
    command = [sys.executable, "-c", code, str(folder.parent)]
    environment = {**os.environ, "PYTHONPATH": ""}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    alone, installed = result.stdout.splitlines()
    assert f"run `pip install .` in {tmp_path}, or from another directory" in alone
    assert installed.startswith(str(folder / "ops.py"))
    command = [sys.executable, "-m", "flashdecpp", "info"]
    environment["PYTHONPATH"] = str(folder.parent)
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert "cpu: yes" in result.stdout, result.stderr


def test_a_child_that_was_forked_before_any_op_works() -> None:
    code = """
import os, torch, flashdecpp
child = os.fork()
x, weight = torch.ones(64, 512), torch.ones(512, 512)
assert flashdecpp.ops.linear(x, weight).sum() == 64 * 512 * 512
if child:
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# ---- folders


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"FLASHDECPP_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/flashdecpp"),
        ({"XDG_CACHE_HOME": "b"}, "/home/me/.cache/flashdecpp"),
        ({"XDG_CACHE_HOME": "", "FLASHDECPP_CACHE": ""}, "/home/me/.cache/flashdecpp"),
        ({}, "/home/me/.cache/flashdecpp"),
    ],
)
def test_where_the_cache_is(environment: dict[str, str], folder: str) -> None:
    with mock.patch.dict(os.environ, {**environment, "HOME": "/home/me"}, clear=True):
        assert cache_folder() == Path(folder)


def test_a_missing_typer_is_one_line() -> None:
    code = "import sys; sys.modules['typer'] = None; sys.argv = ['flashdecpp', 'info']; "
    code += "from flashdecpp.cli import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    wanted = "the command line needs typer, which is not installed: pip install 'flashdecpp[runner]'"
    assert complaint(result) == f"flashdecpp: {wanted}"
