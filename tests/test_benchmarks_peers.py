"""What `benchmarks/peers.py` needs before it can measure: the same weights for all, and a comparison that can fail."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import kvjax

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def peers():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import peers_models
        import peers_worker
    finally:
        sys.path.remove(str(BENCHMARKS))
    return dataclasses.make_dataclass("Peers", ("models", "worker"))(peers_models, peers_worker)


@pytest.fixture(scope="module")
def folder(peers, tmp_path_factory):
    return peers.models.write(tmp_path_factory.mktemp("peers"), "tiny")


def largest(a, b):
    return max(float(np.abs(x - y).max()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.mark.parametrize("shape", ["tiny", "tiny seq2seq"])
def test_a_folder_for_the_peers_holds_the_weights_that_were_made(peers, tmp_path, shape):
    made = peers.models.wide(kvjax.init_params(peers.models.config_of(shape), jax.random.key(0)))
    folder = peers.models.write(tmp_path, shape)
    loaded = kvjax.load(folder).model
    assert loaded.config == peers.models.config_of(shape)
    assert largest(loaded.params, made) == 0

    stored = load_file(folder / "model.safetensors")
    names = [next(x for x in stored if x.endswith(f"self_attn.{letter}_proj.weight")) for letter in "vq"]
    stored[names[0]] = stored[names[0]] + 0.01
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    assert largest(kvjax.load(folder).model.params, made) > 0.005


def test_what_a_peer_says_is_equal_a_tie_or_told_with_its_place(peers, folder):
    lm = kvjax.load(folder)
    prompt = peers.models.prompts(lm, 1, 8, 8)[0]
    mine = peers.models.texts(lm, [prompt], 8)[0]
    assert peers.models.difference(lm, prompt, mine, list(mine)) is None
    other = [*mine[:3], (mine[3] + 1) % 512, *mine[4:]]
    assert peers.models.difference(lm, prompt, mine, other).startswith("differs at token 3")
    assert peers.models.difference(lm, prompt, mine, other, beams=4).startswith("differs at token 3")
    assert peers.models.difference(lm, prompt, mine, mine[:-1]).startswith("differs: 8 tokens and 7")
    same = lm.model.params | {
        "embed": {
            "table": lm.model.params["embed"]["table"].at[other[3]].set(lm.model.params["embed"]["table"][mine[3]])
        }
    }
    alike = dataclasses.replace(lm, model=kvjax.decoder(lm.model.config, same))
    assert peers.models.difference(alike, prompt, mine, other).startswith("tie at token 3")
    said = "tie at token 3: 1.0e-07 of the largest logit; differs at token 9: -2.0e-04 of the largest logit"
    assert peers.models.brief(f"2 of 8 rows: {said}") == "2 of 8 differ, by ≤ 2e-04"
    assert [peers.models.brief(x) for x in ("equal", "differ between rounds")] == ["equal", "differ between rounds"]


def test_a_prompt_whose_text_has_a_tie_is_not_taken(peers, folder):
    lm = kvjax.load(folder)
    table = lm.model.params["embed"]["table"]
    twins = lm.model.params | {"embed": {"table": table.at[256:].set(table[:256])}}
    with pytest.raises(RuntimeError, match="there are 0"):
        peers.models.prompts(dataclasses.replace(lm, model=kvjax.decoder(lm.model.config, twins)), 2, 8, 8)


def test_a_worker_answers_or_says_what_went_wrong(peers, tmp_path):
    script = tmp_path / "peers_of_nobody.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(BENCHMARKS)!r})\nimport peers_worker\n"
        "class Peer:\n"
        "    def generate(self, prompts, new):\n"
        "        print('a word that is no answer')\n"
        "        return {'tokens': [row * new for row in prompts]}\n"
        "peers_worker.serve(Peer())\n"
    )
    worker = peers.worker.Worker(Path(sys.executable), str(script))
    assert worker.ask("generate", prompts=[[1], [2]], new=2) == {"tokens": [[1, 1], [2, 2]]}
    with pytest.raises(RuntimeError, match="no attribute 'prefill'"):
        worker.ask("prefill")
    worker.close()


@pytest.mark.parametrize("script", ["peers.py", "peers_environments.py"])
def test_a_script_of_the_peers_says_what_it_does(script):
    ran = subprocess.run([sys.executable, BENCHMARKS / script, "--help"], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert f"python benchmarks/{script}" in ran.stdout
