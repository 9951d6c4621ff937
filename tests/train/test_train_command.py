"""The output of right and wrong command lines."""

import re
import sys

import numpy as np
import pytest

from mpdit_jax.config.flags import load_config_file
from mpdit_jax.errors import ConfigError, InputError
from mpdit_jax.train import __main__ as train
from tests.tiny import ROOT, refusal, run, train_arguments


def test_help_says_how(capsys):
    with pytest.raises(SystemExit) as done:
        train.main(["--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0
    assert "--config.optimizer.learning_rate=0.0002" in text  # every field with its default
    for part in ("--config=FILE --workdir=FOLDER", "--config.optimizer.learning_rate=3e-4", "examples:", "Ctrl-C"):
        assert part in text


@pytest.mark.parametrize(("arguments", "sentence"), [
    (["--workdir=x"], "--config=FILE is needed"),
    (["--config=configs/digits.py"], "--workdir"),
    (["--config=configs/digits.py", "--workdir=x", "--wrokdir=y"], "unknown argument '--wrokdir=y'"),
    (["--config=configs/digits.py", "--workdir=x", "--steps", "3"], "unknown argument '--steps'"),
    (["--config=digits", "--workdir=x", "--join_timeout=9"], "error: --join_timeout is --initialization_timeout now"),
])  # fmt: skip
def test_wrong_arguments(arguments, sentence, capsys):
    with pytest.raises(SystemExit) as done:
        train.main(arguments)
    assert done.value.code == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(("override", "sentence"), [
    ("--config.batch_sise=3", r"key config\.batch_sise \(did you mean 'batch_size'\?\)"),
    ("--config.optimizer.lr=1e-3", r"unknown config key config\.optimizer\.lr: config\.optimizer has b1,"),
    ("--config.batch_size=many", "^config.batch_size=many: expected a whole number, such as 8"),
    ("--config.steps=1.5", r"^config\.steps=1\.5: expected a whole number"),
    ("--config.optimizer.learning_rate=fast", "^config.optimizer.learning_rate=fast: expected a number"),
    ("--config.model.skip=maybe", "^config.model.skip=maybe: expected True or False"),
    ("--config.model.depths=a,b", r"^model\.depths=\('a,b',\): expected positive whole numbers"),
    ("--config.model=mpdit_b", r"config\.model=mpdit_b: config\.model is a group of fields; set one of --config"),
    ("--config.mesh=2", r"config\.mesh=2: config\.mesh is a group of fields; set one of --config\.mesh\.data, "),
    ("--config.batch_size=0", r"config\.batch_size=0: expected 1 or more"),
    ("--config.ema_decay=1.0", r"config\.ema_decay=1\.0: expected at least 0 and below 1"),
    ("--config.optimizer.learning_rate=nan", r"learning_rate=nan: expected a finite number"),
    ("--config.optimizer.learning_rate=-1.", r"learning_rate=-1\.0: expected a positive number"),
    ("--config.seed=-1", r"config\.seed=-1"),
    ("--config.label_dropout=2.0", "between 0 and 1"),
    ("--config.batch_size=2000000", r"config\.batch_size=2000000: expected 1,048,576 at most"),
    ("--config.steps=3000000000", r"config\.steps=3000000000: expected below 2\*\*31"),
    ("--config.checkpoint.grace=1e12", r"grace=1000000000000\.0: expected seconds, at most 10,000,000"),
    ("--config.gradient_accumulation=3", r"gradient_accumulation=3: expected a divisor of batch_size=8"),
    ("--config.optimizer.name=adam", r"optimizer\.name='adam' \(did you mean 'adamw'\?\)"),
    ("--config.optimizer.schedule=cosine", r"decay_steps=0: expected 1 or more: the number of steps"),
    ("--config.guard.spike_factor=0.5", r"spike_factor=0\.5: expected 0"),
    ("--config.time.distribution=normal", "did you mean 'logit_normal'"),
    ("--config.model.preset=mpdit_bb", "unknown preset 'mpdit_bb'"),
    ("--config.model.patch_sizes=3,1 --config.model.depths=2,1", "multiples of 3"),
    ("--config.model.hidden_size=30", "not divisible by 4"),
    ("--config.model.num_heads=3", "num_heads=3"),
    ("--config.model.num_classes=5", r"set model\.num_classes=10"),
    ("--config.model.in_channels=3", r"in_channels=1"),
    ("--config.data.name=cifar10", "expected one of digits"),
    ("--config.data.name=digits --config.data.split=none", "expected one of all"),
    ("--config.mesh.data=3", r"does not fit \d+ cpu device"),
])  # fmt: skip
def test_wrong_values_are_one_sentence_before_anything_is_written(tmp_path, monkeypatch, capsys, override, sentence):
    arguments = train_arguments(tmp_path / "run", *override.split())
    assert re.search(sentence, refusal(train.main, arguments, monkeypatch, capsys))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("content", "sentence"), [
    ("def get_config(): return 3", "must return a ConfigDict"),
    ("def get_config(:", "invalid syntax"),
    ("import nonexistent_module", "nonexistent_module"),
    ("from mpdit_jax.config import *\ndef get_config():\n c = base_config()\n c.stepz = 3\n return c", "stepz"),
    ("from ml_collections import ConfigDict\ndef get_config(): return ConfigDict({'steps': 3})", "is missing"),
    ("x = 1", "no attribute 'get_config'"),
])  # fmt: skip
def test_broken_config_files(tmp_path, content, sentence):
    path = tmp_path / f"broken_{abs(hash(content))}.py"  # Python caches modules by name
    path.write_text(content)
    with pytest.raises(ConfigError, match=sentence) as caught:
        train.main([f"--config={path}", f"--workdir={tmp_path / 'run'}"])
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(("value", "sentence"), [
    ("nowhere.py", r"no such file; mpdit_jax ships ablation, digits, .*vae_fashion\.$"),
    ("digits.py", r"no such file; mpdit_jax ships --config=digits\.$"),
    ("configs/ablation.py:time_fno_2", r"no such file; mpdit_jax ships --config=ablation:time_fno_2\.$"),
    ("configs/digits", r"expected a Python file or the name of a shipped config; mpdit_jax ships --config=digits\.$"),
    ("digts", r"expected a Python file or .* config \(did you mean 'digits'\?\); mpdit_jax ships ablation, "),
])  # fmt: skip
def test_missing_config_file(tmp_path, monkeypatch, value, sentence):
    monkeypatch.chdir(tmp_path)
    for more in ([], ["--config.steps=3"]):
        with pytest.raises(ConfigError, match=rf"^--config={re.escape(value)}: {sentence}"):
            train.main([f"--config={value}", f"--workdir={tmp_path}", *more])


def test_a_config_file_imports_its_neighbour_and_takes_a_word(tmp_path):
    (tmp_path / "neighbour_of_mine.py").write_text("from mpdit_jax.config import base_config\n")
    (tmp_path / "mine.py").write_text(
        "from neighbour_of_mine import base_config\n"
        "def get_config(steps):\n config = base_config()\n config.steps = int(steps)\n return config\n"
    )
    assert load_config_file(f"{tmp_path / 'mine.py'}:7").steps == 7
    assert str(tmp_path) not in sys.path
    (tmp_path / "more").mkdir()
    (tmp_path / "more/neighbour_of_mine.py").write_text("from mpdit_jax.config import base_config as other\n")
    (tmp_path / "more/mine.py").write_text("from neighbour_of_mine import other as get_config\n")
    assert load_config_file(str(tmp_path / "more/mine.py")).steps == 300_000  # its own neighbour, of the same name
    (tmp_path / "mine.py").write_text("from .neighbour_of_mine import base_config as get_config\n")
    with pytest.raises(ConfigError, match="a config imports its neighbour by name, `import other`"):
        load_config_file(str(tmp_path / "mine.py"))


def test_unwritable_workdir(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("mine")
    arguments = train_arguments(tmp_path / "file" / "run")
    assert "cannot write" in refusal(train.main, arguments, monkeypatch, capsys)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
def test_errors_leave_the_process_as_one_line(tmp_path):
    status, stdout, stderr = run("train", train_arguments(tmp_path / "run", "--config.steps=0"))
    assert (status, stdout) == (1, "")
    assert stderr == "error: config.steps=0: expected 1 or more.\n"


def test_nan_in_the_data_ends_with_a_sentence(tmp_path):
    images = np.zeros((16, 8, 8, 1), np.float32)
    images[11, 2, 2] = np.nan
    np.savez(tmp_path / "mine.npz", images=images, labels=np.arange(16) % 10)
    data = ["--config.data.name=arrays", f"--config.data.path={tmp_path / 'mine.npz'}"]
    status, _, stderr = run("train", train_arguments(tmp_path / "run", *data))
    assert status == 1
    assert stderr == f"error: {tmp_path / 'mine.npz'}: example 11 of the data holds NaN or Inf; remove or repair it.\n"


def test_two_word_flags(tmp_path):
    arguments = ["--config", str(ROOT / "configs/digits.py"), "--workdir", str(tmp_path / "run"), "--config.steps", "0"]
    with pytest.raises(ConfigError, match=r"config\.steps=0"):
        train.main(arguments)


@pytest.mark.slow
def test_a_diverged_run_ends_with_a_sentence(tmp_path):
    more = ["--config.optimizer.learning_rate=1e30", "--config.log.every=2", "--config.guard.abort_after=2"]
    arguments = train_arguments(tmp_path / "run", *more)
    status, _, stderr = run("train", arguments)
    assert status == 3
    assert "by step 2, an update made of finite gradients was not finite or its squares overflowed" in stderr
    assert "there is no checkpoint" in stderr
    assert "learning_rate" in stderr
    assert "Traceback" not in stderr


def parsed(*arguments):
    """Return the config that `train` reads from a command line."""
    from mpdit_jax.config.flags import parse_with_config
    from mpdit_jax.runtime.cli import make_parser

    return parse_with_config(make_parser("train", "", ""), [f"--config={ROOT / 'configs/digits.py'}", *arguments])[1]


def test_overrides_in_two_words_and_given_twice():
    assert parsed("--config.model.skip", "False").model.skip is False
    assert parsed("--config.model.skip=True", "--config.model.skip=False").model.skip is False
    assert parsed("--config.model.depths=4,1", "--config.model.depths=8,2").model.depths == (8, 2)
    assert parsed("--config.steps", "7", "--config.steps=9").steps == 9
    with pytest.raises(SystemExit):
        parsed("--config.steps=7", "7")


def test_a_preset_on_the_command_line_wins_over_the_file():
    from mpdit_jax.config import resolve

    model = resolve(parsed("--config.model.preset=mpdit_b", "--config.model.patch_sizes=2,1")).model
    assert (model.hidden_size, model.num_heads, model.depths) == (768, 12, (6, 6))
    assert (model.patch_sizes, model.input_size, model.num_classes) == ((2, 1), (8, 8), 10)


def test_what_the_preset_has_no_use_for_is_left_out_of_the_file():
    """A DiT has no class tokens: the file's class_tokens is left out, the command line's is refused."""
    from mpdit_jax.config import resolve
    from mpdit_jax.errors import ConfigError

    assert resolve(parsed("--config.model.preset=dit_s_2")).model.class_tokens == 16
    with pytest.raises(ConfigError, match=r"model\.class_tokens=4 would change nothing"):
        resolve(parsed("--config.model.preset=dit_s_2", "--config.model.class_tokens=4"))


def test_empty_workdir_is_refused(capsys):
    with pytest.raises(SystemExit):
        train.main([f"--config={ROOT / 'configs/digits.py'}", "--workdir="])
    assert "--workdir is empty" in capsys.readouterr().err


def test_a_bucket_is_no_folder():
    with pytest.raises(InputError, match="--workdir=gs://bucket/run: expected a folder"):
        train.main([f"--config={ROOT / 'configs/digits.py'}", "--workdir=gs://bucket/run"])


def test_cudnn_attention_needs_a_gpu(tmp_path):
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU and this is cpu"):
        train.main(train_arguments(tmp_path / "run", "--config.model.attention=cudnn"))
    assert not (tmp_path / "run").exists()
