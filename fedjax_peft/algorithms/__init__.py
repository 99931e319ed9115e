"""The methods, one file each. `ALL` lists what a config may ask for by name."""

from fedjax_peft.algorithms import bayestune, fedavg, fedp2eft, lora

ALL = {
    factory.__name__: factory
    for factory in (
        bayestune.bayestune,
        fedavg.centralized,
        fedavg.fedit,
        fedavg.fedprox,
        fedavg.fedsa_lora,
        fedavg.ffa_lora,
        fedavg.local_only,
        fedp2eft.fedp2eft,
        lora.lora,
    )
}
