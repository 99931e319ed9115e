"""The methods, one file each. `ALL` lists what a config may ask for by name."""

from fedjax_peft.algorithms import fedavg

ALL = {
    factory.__name__: factory
    for factory in (
        fedavg.centralized,
        fedavg.fedit,
        fedavg.fedprox,
        fedavg.fedsa_lora,
        fedavg.ffa_lora,
        fedavg.local_only,
    )
}
