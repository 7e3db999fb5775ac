"""The laboratory from Python: compare, train and resume, in this process and from scripts."""

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from flatmin import lab
from flatmin.errors import DataError, FlatminError, FlatminWarning, InvalidArgumentError
from flatmin.lab.comparison import compare as compare_module
from flatmin.lab.comparison.main_guard import check_main_guard
from flatmin.lab.results import read_comparison
from flatmin.lab.runs.checkpoint import load_checkpoint
from flatmin.lab.runs.train import RunInterrupted
from flatmin.lab.training.trainer import Trainer

RECIPE = "lab.Recipe(experiment={experiment!r}, epochs=1, batch_size=32, device='cpu')"
CALL = f"lab.compare({RECIPE}, methods=['base', 'sam'], seeds=1, jobs=1, minutes=0.01, out='found')"


def recipe(experiment, **options):
    return lab.Recipe(experiment=experiment, **{"epochs": 2, "batch_size": 16, "device": "cpu", **options})


def python(*arguments, cwd):
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, timeout=200)


class TestTrain:
    def test_it_returns_the_last_metrics_and_the_folder(self, experiment, tmp_path):
        seen = []
        found = lab.train(recipe(experiment), method="sam", out=tmp_path / "run", on_epoch=seen.append)
        lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
        assert found.folder == tmp_path / "run"
        assert found.metrics == {**seen[-1], "extra_bytes": 332, "mean_closure_calls": 2.0}
        assert lines == seen
        assert str(found).endswith(f"{100 * lines[-1]['test_accuracy']:.2f} %; the run is in {found.folder}")

    def test_a_path_stands_for_a_recipe_and_settings_reach_the_run(self, experiment, tmp_path, monkeypatch):
        monkeypatch.setattr(Trainer, "evaluate", lambda self: (1.0, 0.5))
        found = lab.train(Path(experiment), method="saf", settings={"lag": 2}, seed=3, out=tmp_path / "run")
        assert (found.run.recipe.epochs, found.run.settings["lag"], found.run.seed) == (60, 2, 3)
        assert found.run.recipe.experiment == experiment

    @pytest.mark.parametrize("lost", [0, 1, None])
    def test_one_that_diverges_says_so_once(self, experiment, tmp_path, monkeypatch, lost):
        plain, epochs = Trainer.evaluate, iter(range(3))

        def evaluate(trainer):
            loss, accuracy = plain(trainer)
            epoch = next(epochs)
            return (loss if lost is None or epoch < lost else math.nan), accuracy

        monkeypatch.setattr(Trainer, "evaluate", evaluate)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            done = lab.train(recipe(experiment, epochs=3), method="base", out=tmp_path / "run")
        said = [str(each.message) for each in caught if issubclass(each.category, FlatminWarning)]
        if lost is None:
            assert said == []
            assert str(done).startswith("test accuracy after")
        else:
            assert len(said) == 1
            assert f"diverged: the test loss is nan after epoch {lost + 1} of 3" in said[0]
            assert "%, for it has diverged (test loss nan); the run is in" in str(done)

    def test_one_that_was_ended_goes_on_and_is_bit_identical(self, experiment, tmp_path):
        def end(metrics):
            raise KeyboardInterrupt

        settings = {"start_epoch": 1, "lag": 1}
        options = {"method": "saf", "settings": settings, "seed": 1}
        with pytest.raises(RunInterrupted, match=r"1 of 3 epochs are kept in .*; to go on: flatmin train --resume"):
            lab.train(recipe(experiment, epochs=3), out=tmp_path / "run", on_epoch=end, **options)
        whole = lab.train(recipe(experiment, epochs=3), out=tmp_path / "whole", **options)
        seen = []
        found = lab.resume(tmp_path / "run", workers=0, on_epoch=seen.append)
        assert [metrics["epoch"] for metrics in seen] == [1, 2]
        assert {**found.metrics, "seconds": 0} == {**whole.metrics, "seconds": 0}
        ours, theirs = (load_checkpoint(tmp_path / name / "checkpoints/last")["model"] for name in ("run", "whole"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert lab.resume(tmp_path / "run").metrics == found.metrics

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (lambda: lab.train(method="saff"), InvalidArgumentError, "unknown method 'saff', did you mean saf"),
            (lambda: lab.train(3), InvalidArgumentError, "recipe must be a Recipe or the path .* got 3"),
            (lambda: lab.train(seed=-1), InvalidArgumentError, "seed must be an integer of at least 0"),
            (lambda: lab.train(settings={"rho": 1}), InvalidArgumentError, "saf has no hyperparameter 'rho'"),
            (lambda: lab.resume("nowhere"), DataError, "no run there"),
            (lambda: lab.compare(methods=["sam"]), InvalidArgumentError, "must include base"),
            (lambda: lab.compare(seeds=0), InvalidArgumentError, "seeds must be an integer of at least 1"),
            (lambda: lab.compare(jobs=0), InvalidArgumentError, "jobs must be an integer of at least 1"),
            (lambda: lab.compare(minutes=0), InvalidArgumentError, "minutes must be a finite number > 0"),
            (lambda: lab.compare(look=1), InvalidArgumentError, "look must be at least 2 points"),
            (lambda: lab.compare(select=1), InvalidArgumentError, "select has nothing to choose from"),
            (
                lambda: lab.compare(lab.Recipe(validation=0.1), select=1, settings={"saf": {"lag": [1, 2]}}),
                InvalidArgumentError,
                "select holds out samples itself",
            ),
        ],
    )
    def test_what_cannot_be_leaves_nothing(self, tmp_path, monkeypatch, call, error, message):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(error, match=message):
            call()
        assert not any(tmp_path.iterdir())


class TestCompare:
    def test_from_a_script_it_returns_what_it_writes(self, experiment, tmp_path):
        script = tmp_path / "script.py"
        call = CALL.format(experiment=experiment)
        script.write_text(
            "import json\nfrom flatmin import lab\n\n"
            f"if __name__ == '__main__':\n    found = {call}\n"
            "    print(found)\n    print(json.dumps(found.to_json(), allow_nan=False))\n    print(found.page)\n"
        )
        done = python(str(script), cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        *table, written, page = done.stdout.splitlines()
        folder = tmp_path / "found"
        on_disk = json.loads((folder / "results.json").read_text())
        assert on_disk.items() >= json.loads(written).items()
        assert table == str(read_comparison(folder)).splitlines()
        assert table[-1] == on_disk["verdict"] == "1 finished seed: too few for a claim, which takes 5."
        assert sorted(path.name for path in (folder / "runs").iterdir()) == ["base-seed0", "sam-seed0"]
        assert on_disk["verdict"] in (tmp_path / page).read_text()

    def test_a_method_that_the_processes_cannot_know_is_said(self, experiment, tmp_path):
        script = tmp_path / "script.py"
        script.write_text(
            "from flatmin import lab\nfrom flatmin.lab.methods import Card, METHODS, register\n\n"
            "if __name__ == '__main__':\n    register(Card('mine', 'x', {}, METHODS['base'].assemble))\n"
            f"    recipe = {RECIPE.format(experiment=experiment)}\n"
            "    lab.compare(recipe, methods=['base', 'mine'], seeds=1, jobs=1, minutes=0.01, out='found')\n"
        )
        done = python(str(script), cwd=tmp_path)
        assert done.returncode == 1
        assert "method 'mine' is not known in the processes that train: register it in the experiment" in done.stderr

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"methods": "base,saf"}, r"methods must be a list of names, got 'base,saf'; write \['base', 'saf'\]"),
            ({"settings": {"saf.lag": [1]}}, r"settings must be a mapping for each method, got \[1\] for 'saf.lag'"),
        ],
    )
    def test_slips_are_named(self, experiment, tmp_path, given, message):
        with pytest.raises(InvalidArgumentError, match=message):
            lab.compare(str(experiment), out=tmp_path / "found", **given)

    def test_from_the_interpreter_no_guard_is_needed(self, experiment, tmp_path):
        code = f"from flatmin import lab; found = {CALL.format(experiment=experiment)}; print(found.seeds)"
        done = python("-c", code, cwd=tmp_path)
        assert (done.returncode, done.stdout) == (0, "[0]\n"), done.stderr

    def test_without_the_guard_it_says_so_before_anything_is_started(self, experiment, tmp_path):
        script = tmp_path / "script.py"
        script.write_text(f"from flatmin import lab\nprint('once')\nfound = {CALL.format(experiment=experiment)}\n")
        done = python(str(script), cwd=tmp_path)
        assert (done.returncode, done.stdout) == (1, "once\n")
        said = (
            "script.py, line 3: compare starts processes, each of which imports this script again: put the call under"
        )
        assert done.stderr.count("compare starts processes") == 1
        assert said in done.stderr
        assert not (tmp_path / "found").exists()

    def test_a_process_that_imports_the_script_goes_no_further(self):
        code = compile("check_main_guard()", "script.py", "exec")
        with pytest.raises(FlatminError, match="under `if __name__"):
            exec(code, {"__name__": "__mp_main__", "check_main_guard": check_main_guard})

    @pytest.mark.parametrize(
        ("text", "guarded"),
        [
            ('if __name__ == "__main__":\n    main()', True),
            ('if "__main__" == __name__ and True:\n    if True:\n        main()', True),
            ('try:\n    if __name__ == "__main__":\n        main()\nfinally:\n    pass', True),
            ("main()", False),
            ('if __name__ != "__main__":\n    pass\nelse:\n    main()', True),
            ("if True:\n    main()", False),
            ('if __name__ == "__main__":\n    pass\nmain()', False),
        ],
    )
    def test_what_counts_as_guarded(self, tmp_path, monkeypatch, text, guarded):
        path = tmp_path / "script.py"
        path.write_text(text)
        script = {"__name__": "__main__", "__file__": str(path), "main": check_main_guard}
        module = type(sys)("__main__")
        vars(module).update(script)
        monkeypatch.setitem(sys.modules, "__main__", module)
        if guarded:
            exec(compile(text, str(path), "exec"), vars(module))
        else:
            with pytest.raises(FlatminError, match="compare starts processes"):
                exec(compile(text, str(path), "exec"), vars(module))

    def test_settings_may_be_single_values(self, experiment, tmp_path, monkeypatch):
        noted = {}

        class Noting:
            def __init__(self, recipe, rows, folder, **options):
                noted.update(rows=rows, options=options)
                raise KeyError

        monkeypatch.setattr(compare_module, "Comparison", Noting)
        settings = {"sam": {"rho": 0.1, "when": "every:2"}, "saf": {"lag": (1, 2)}}
        with pytest.raises(KeyError), pytest.warns(FlatminWarning, match="never acts"):
            lab.compare(recipe(experiment), methods=["base", "sam", "saf"], settings=settings, out=tmp_path / "run")
        assert [row.label for row in noted["rows"]] == ["base", "sam rho=0.1 when=every:2", "saf lag=1", "saf lag=2"]
        assert not (tmp_path / "run").exists()

    def test_ctrl_c_while_settings_are_chosen_says_what_is_kept(self, experiment, tmp_path, monkeypatch):
        def select(recipe, rows, folder, **_):
            assert (recipe.experiment, recipe.epochs) == (str(experiment), 60)  # a path stands for a recipe
            run = folder / "runs" / "base-seed1000"
            run.mkdir(parents=True)
            (run / "metrics.jsonl").write_text("{}\n")
            raise KeyboardInterrupt

        monkeypatch.setattr(compare_module, "select_rows", select)
        settings = {"sam": {"rho": [0.1, 0.2]}}
        with pytest.raises(RunInterrupted, match=r"not chosen yet, kept in .*selection"):
            lab.compare(str(experiment), methods=["base", "sam"], settings=settings, select=1, out=tmp_path / "run")
        assert (tmp_path / "run" / "selection").exists()

    def test_a_diverged_network_is_not_looked_at_and_the_others_are(self, experiment, tmp_path):
        with pytest.warns(FlatminWarning, match=r"so without a result: logit_squeezing .*\(1 of 1\)") as caught:
            found = lab.compare(
                recipe(experiment, epochs=2), methods=["base", "logit_squeezing"],
                settings={"logit_squeezing": {"coefficient": 1e38}},
                seeds=1, jobs=1, look=3, minutes=0.01, out=tmp_path / "run",
            )  # fmt: skip
        assert len([each for each in caught if "diverged" in str(each.message)]) == 1
        assert [row.diverged for row in found.rows] == [0, 1]
        looked = sorted(each.parent.name for each in (tmp_path / "run").rglob("sharpness.json"))
        assert looked == ["base-seed0"]
        assert "diverged" in str(found)

    def test_looking_writes_sharpness_and_landscape_of_the_first_seed(self, experiment, tmp_path):
        found = lab.compare(
            recipe(experiment), methods=["base"], seeds=2, jobs=1, look=3, minutes=0.01, out=tmp_path / "run"
        )
        first, second = (found.folder / "runs" / f"base-seed{seed}" for seed in (0, 1))
        assert json.loads((first / "sharpness.json").read_text())["spectral_density"]
        assert len(json.loads((first / "landscape.json").read_text())["loss"]) == 3
        assert not (second / "sharpness.json").exists()
