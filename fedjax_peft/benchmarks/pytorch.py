"""The other side of `fedjax-peft bench`: the same clients one after another in PyTorch, transformers and PEFT.

    python -m fedjax_peft.benchmarks.pytorch FOLDER

FOLDER holds `job.json`, `weights.npz` and `batches.npz` (see `bench.make_theirs`). For each line on standard input,
`restart` or `round`, one line of JSON goes to standard output. This is how the clients of a federation are usually
simulated: one model, whose adapter is set to the global one before each client's turn; batches are cut to their longest
text.
"""

import json
import pathlib
import sys
import time
from typing import Any

import numpy as np
import peft
import torch
import transformers


def main() -> None:
    """Answers until standard input ends."""
    folder = pathlib.Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())
    batches = {name: torch.from_numpy(array) for name, array in np.load(folder / "batches.npz").items()}
    model = make_model(job, dict(np.load(folder / "weights.npz"))).to(job["device"])
    initial = _trained(model)
    for line in sys.stdin:
        if line.strip() == "restart":
            _set(model, initial)
            answer = {"threads": torch.get_num_threads()}
        else:
            start = time.perf_counter()
            losses = one_round(model, batches, job["rate"])
            answer = {"losses": losses, "seconds": time.perf_counter() - start}
        print(json.dumps(answer), flush=True)


def make_model(job: dict[str, Any], weights: dict[str, np.ndarray]) -> torch.nn.Module:
    """Hugging Face's sequence classifier with PEFT's LoRAs, and the weights that are named in `weights`."""
    fields = {
        key: value for key, value in job["config"].items() if key not in ("architectures", "torch_dtype", "dtype")
    }
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = transformers.AutoConfig.for_model(**fields | dropout, num_labels=job["classes"])
    plain = transformers.AutoModelForSequenceClassification.from_config(config, dtype=getattr(torch, job["dtype"]))
    lora = peft.LoraConfig(
        task_type="SEQ_CLS", r=job["rank"], lora_alpha=job["alpha"], lora_dropout=0.0, target_modules=job["targets"]
    )
    prefix = plain.base_model_prefix
    model = peft.get_peft_model(plain, lora).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weights[_our_name(name, prefix)]))
    return model


def one_round(model: torch.nn.Module, batches: dict[str, torch.Tensor], rate: float) -> list[float]:
    """Trains each client from the same adapters and leaves their average; the mean loss of each client."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    start, total, losses = _trained(model), None, []
    clients, steps = batches["labels"].shape[:2]
    for client in range(clients):
        _set(model, start)
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        steps_losses = []
        for step in range(steps):
            mask = batches["mask"][client, step]
            longest = int(mask.sum(-1).max())
            inputs = {
                "input_ids": batches["tokens"][client, step, :, :longest],
                "attention_mask": mask[:, :longest].long(),
            }
            inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
            optimizer.zero_grad()
            logits = model(**inputs).logits.float()
            labels = batches["labels"][client, step].long().to(model.device)
            loss = torch.nn.functional.cross_entropy(logits, labels)
            loss.backward()
            optimizer.step()
            steps_losses.append(loss.detach())
        losses.append(torch.stack(steps_losses).mean())
        own = _trained(model)
        total = own if total is None else [left + right for left, right in zip(total, own, strict=True)]
    _set(model, [tensor / clients for tensor in total])
    return torch.stack(losses).tolist()


def _trained(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters() if parameter.requires_grad]


def _set(model: torch.nn.Module, values: list[torch.Tensor]) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def _our_name(name: str, prefix: str) -> str:
    """`base_model.model.bert.x.base_layer.weight` -> `x.weight`, and the like for what PEFT wraps in other ways."""
    name = name.removeprefix("base_model.model.").removeprefix(f"{prefix}.")
    for wrapped in (".base_layer", ".original_module", ".modules_to_save.default", ".default"):
        name = name.replace(wrapped, "")
    return name


if __name__ == "__main__":
    main()
