"""The built-in model as a GGUF file, answering as it does itself."""

from pathlib import Path

import pytest

from tenfold import LLM, SamplingParams
from tenfold.base import gguf
from tenfold.base.errors import CheckpointError
from tenfold.base.ggml_blocks import GGMLType
from tests.gguf_files import metadata, tensors, write_pico

QUESTION = [{"role": "user", "content": "What does os.path.join do?"}]


def answer(model: Path | None) -> str:
    llm = LLM(model, max_model_len=128, max_num_seqs=1, max_num_batched_tokens=32)
    try:
        output = llm.chat(QUESTION, SamplingParams(temperature=0.0, max_tokens=80), use_tqdm=False)[0].outputs[0]
        assert output.finish_reason == "stop"
        return output.text
    finally:
        llm.engine.close()


@pytest.fixture(scope="module")
def own() -> str:
    return answer(None)


@pytest.mark.parametrize(
    "kind", [pytest.param(GGMLType.F32, marks=pytest.mark.slow), GGMLType.BF16, GGMLType.Q8_0], ids=str
)
def test_the_answer_is_the_same(tmp_path: Path, own: str, kind: GGMLType) -> None:
    write_pico(tmp_path / "pico.gguf", kind)
    assert len(own) > 20
    assert answer(tmp_path / "pico.gguf") == own


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    written = tensors(GGMLType.Q4_0)
    del written["blk.7.ffn_down.weight"]
    gguf.write(tmp_path / "pico.gguf", metadata(), written)
    with pytest.raises(CheckpointError, match=r"model\.layers\.7\.mlp\.down_proj\.weight"):
        LLM(tmp_path / "pico.gguf", max_model_len=128)
