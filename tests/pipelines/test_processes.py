"""Training in several processes under accelerate, against one process that does all of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from identity_edit_pack.pipelines.shared.errors import IdentityEditError
from identity_edit_pack.pipelines.training import processes

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]

# Without ComfyUI, whose start is most of the time: the package is made of its folder, the entry point does not run.
WORKER = f"""
import sys, types
package = types.ModuleType("identity_edit_pack")
package.__path__ = [{str(ROOT)!r}]
sys.modules["identity_edit_pack"] = package
import torch
from safetensors.torch import save_file
from identity_edit_pack.pipelines.training import loop as training, processes
from identity_edit_pack.pipelines.training.loop import TrainingSettings, generator_of

def problem():
    weight = torch.ones(3, 4, requires_grad=True)
    unused = torch.ones(2, requires_grad=True)
    def losses(index):
        x = torch.randn(5, 4, generator=generator_of(1, index))
        yield (torch.tanh(x @ weight.T) - x[:, :3]).square().mean()
    return {{"weight": weight, "unused": unused}}, losses

if __name__ == "__main__":
    group = processes.launched_processes()
    variables, losses = problem()
    settings = TrainingSettings(steps=6, learning_rate=0.05, accumulation=int(sys.argv[2]), checkpoint_every=2)
    run = training.train(
        variables,
        losses,
        settings,
        processes=group,
        checkpoint=lambda run: f"{{sys.argv[1]}}/{{group.index}}.checkpoint",
        needed=["weight"],
    )
    group.wait()
    result = {{"weight": variables["weight"].detach(), "losses": torch.tensor(run.losses)}}
    save_file(result, f"{{sys.argv[1]}}/{{group.count}}-{{group.index}}.safetensors")
"""


def launch(folder: Path, count: int, accumulation: int) -> list[dict[str, torch.Tensor]]:
    from safetensors.torch import load_file

    script = folder / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, str(script), str(folder), str(accumulation)]
    if count > 1:  # torchrun, which accelerate launch itself runs for GPUs; for CPUs it would want MPI
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [load_file(folder / f"{count}-{index}.safetensors") for index in range(count)]


def test_two_launched_processes_do_what_one_does_with_twice_the_accumulation(tmp_path: Path) -> None:
    (alone,) = launch(tmp_path, 1, 4)
    checkpoint = tmp_path / "0.checkpoint"
    checkpoint.unlink()
    both = launch(tmp_path, 2, 2)
    for result in both:
        assert torch.allclose(result["weight"], alone["weight"], atol=1e-6)
        assert torch.allclose(result["losses"], alone["losses"], atol=1e-6)
    assert checkpoint.exists() and not (tmp_path / "1.checkpoint").exists()


def test_one_process_needs_no_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setitem(sys.modules, "accelerate", None)
    assert isinstance(processes.launched_processes(), processes.OneProcess)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(IdentityEditError, match="pip install accelerate"):
        processes.launched_processes()
