"""Folders of strangers: their code is not run, nothing in them makes a command hang, and what is wrong is told in one line."""

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers

import lowbit
from lowbit.cli import main

ROOT = Path(__file__).resolve().parents[1]
QUANTIZE = ("--scheme", "w4a16-g32", "--data", "random", "--rows", "2", "--length", "16")
MARK = 'open("EXECUTED", "w").close()\n'
EVIL_CONFIG = MARK + "from transformers import PreTrainedConfig\nclass C(PreTrainedConfig): model_type = 'evil'\n"
EVIL_TOKENIZER = MARK + "from transformers import PreTrainedTokenizerFast\nclass T(PreTrainedTokenizerFast): pass\n"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama with a tokenizer, in one shard, to be read only."""
    folder = tmp_path_factory.mktemp("pristine") / "llama"
    tiny.save("llama", folder, dtype=torch.bfloat16, max_shard_size="1GB")
    tiny.save_tokenizer(folder)
    return folder


@pytest.fixture
def model(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to spoil; the working directory is beside it."""
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def change(path: Path, **values: Any) -> None:
    """Set keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def evil_config(model: Path) -> str:
    """A model type of its own, made by code; returns what the refusal names."""
    (model / "evil.py").write_text(EVIL_CONFIG)
    change(model / "config.json", model_type="evil", auto_map={"AutoConfig": "evil.C"})
    return "config.json"


def evil_tokenizer(model: Path) -> str:
    """A tokenizer made by code; returns what the refusal names."""
    (model / "evil.py").write_text(EVIL_TOKENIZER)
    change(model / "tokenizer_config.json", tokenizer_class="T", auto_map={"AutoTokenizer": [None, "evil.T"]})
    return "tokenizer_config.json"


def arguments_of(command: str, model: Path) -> list[str]:
    """A small run of a command on the model."""
    text = model.parent / "text.txt"
    text.write_text("\n".join(tiny.TEXT * 4))
    return {
        "quantize": ["quantize", str(model), "--out", "out", "--scheme", "w4a16-g32", "--method", "gptq"]
        + ["--data", str(text), "--rows", "2", "--length", "16"],
        "plan": ["plan", str(model), "--out", "p.toml", "--bits", "5", "--data", str(text), "--rows", "1", "--length", "8"],
        "eval": ["eval", str(model), "--data", str(text), "--window", "32"],
        "generate": ["generate", str(model), "--prompt", "The"],
    }[command]


# -------------------------------------------------------------------------------------------------------------- their code


@pytest.mark.parametrize("command", ["quantize", "plan", "eval", "generate"])
@pytest.mark.parametrize("spoil", [evil_config, evil_tokenizer])
def test_code_is_not_run(
    model: Path, spoil: Any, command: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whoever says yes on standard input: nobody asks there."""
    named = spoil(model)
    arguments = arguments_of(command, model)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    assert main(arguments) == 2
    err = capfd.readouterr().err
    assert not Path("EXECUTED").exists() and not Path("out").exists()
    assert err.startswith("lowbit: ") and err.count("\n") == 1, err
    assert f"{named} asks for Python code" in err and "(evil." in err and "--trust-remote-code" in err
    assert sys.stdin.read(2) == "y\n"


def test_known_model_with_code_loads_without_it(model: Path) -> None:
    """transformers knows the type, so its own class is taken, and no one is asked."""
    (model / "evil.py").write_text(EVIL_CONFIG)
    change(model / "config.json", auto_map={"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"})
    change(model / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "evil.T"]})
    assert type(lowbit.load(str(model))) is transformers.LlamaForCausalLM
    assert main(arguments_of("eval", model)) == 0
    assert not Path("EXECUTED").exists()


@pytest.mark.slow
def test_yes_in_a_pipe(model: Path) -> None:
    """The same through a real standard input, as `yes | lowbit ...`."""
    evil_config(model)
    command = f"yes | {sys.executable} -m lowbit quantize model --out out {' '.join(QUANTIZE)}"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, shell=True, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--trust-remote-code" in done.stderr
    assert not Path("EXECUTED").exists()


OWN = """
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, input_ids=None, use_cache=None, **kwargs):
        out = super().forward(input_ids=input_ids, use_cache=use_cache, **kwargs)
        out.logits = -out.logits
        return out

class OwnTokenizer(PreTrainedTokenizerFast):
    def __call__(self, text, *args, **kwargs):
        return super().__call__(text.upper(), *args, **kwargs)
"""


def own(model: Path) -> None:
    """Make it a model that only its own code can load, tokenizer included."""
    (model / "own.py").write_text(OWN)
    change(
        model / "config.json",
        model_type="own",
        architectures=["OwnForCausalLM"],
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    )
    change(
        model / "tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]}
    )


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have transformers keep the code it copies here."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.mark.usefixtures("own_cache")
def test_trusted_code(model: Path, pristine: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """With the flag the model is quantized, loaded and used by its own code, which the output keeps."""
    own(model)
    assert main([*arguments_of("quantize", model), "--trust-remote-code"]) == 0, capfd.readouterr().err
    assert Path("out/own.py").read_text() == OWN
    with pytest.raises(ValueError, match="--trust-remote-code"):
        lowbit.load("out")
    loaded: Any = lowbit.load("out", trust_remote_code=True)
    assert type(loaded).__name__ == "OwnForCausalLM"
    plain: Any = lowbit.load(str(pristine))
    tokens = tiny.tokens(1, 16)
    agreement = torch.nn.functional.cosine_similarity(
        loaded(tokens).logits.flatten().float(), -plain(tokens).logits.flatten().float(), dim=0
    )
    assert agreement > 0.9
    for command in ("eval", "generate"):
        assert main([*arguments_of(command, Path("out").resolve()), "--trust-remote-code"]) == 0, capfd.readouterr().err
    told = capfd.readouterr().out
    assert "perplexity" in told and "THE" in told


@pytest.mark.slow
@pytest.mark.usefixtures("own_cache")
def test_trusted_code_in_other_processes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks of a parallel training and the processes of a comparison get the decision too."""
    own(model)
    monkeypatch.setenv("HF_HOME", str(model.parent / "home"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    spec = lowbit.recipe.DataSpec(source="random", rows=8, length=16)
    options = {"mrem.steps": 4}
    given: dict[str, Any] = {"scheme": "w4a16-g32", "method": "rtn+mrem", "options": options, "data": spec}
    lowbit.quantize(str(model), "out", parallel=2, trust_remote_code=True, **given)
    assert Path("out/own.py").exists()
    arguments_of("eval", model)
    recipe = lowbit.recipe.short_recipe(scheme="w4a16-g32")
    result = lowbit.compare(
        str(model), {"a": recipe}, "compared", texts=["text.txt"], window=16, windows=1, trust_remote_code=True
    )
    assert "failed" not in result["rows"][0], result["rows"][0]
