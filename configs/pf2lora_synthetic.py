"""PF2LoRA's synthetic study: which methods find the rank of each client's problem?

    fedjax-peft run --config=configs/pf2lora_synthetic.py --workdir=runs/pf2lora_synthetic

Two clients regress y = W x with W of rank r - r~ and r + r~ (here 3 and 5) that share their leading directions; 100
examples each, no noise. Constants of the example in the paper (Hao et al., PF2LoRA, arXiv 2503.03920) are not public:
problem and step sizes are ours, chosen such that a working implementation finds the ranks, so this tests code rather
than the paper's claim. Other settings that do: --config.client_rank=2 --config.lr_common=0.3 --config.interval=1.

Expected, ten problems (most frequent learnt ranks, problems in which both are right, median losses):

    pf2lora              3  5   10 of 10   4.9e-12  6.1e-12
    pf2lora_fo           3  5   10 of 10   5.0e-12  6.1e-12
    pf2lora_joint        3  5   10 of 10   4.8e-12  6.1e-12
    centralized          4  4    0 of 10   1.4e-01  5.5e-01
    homlora              4  4    0 of 10   1.3e-01  5.7e-01
    homlora_wide         5  5    0 of 10   2.4e-01  2.5e-01
    homlora_tuned        4  4    0 of 10   3.0e-03  4.2e-01
    homlora_wide_tuned   4  5    2 of 10   5.9e-04  1.6e-03
    perfedavg            4  4    0 of 10   7.3e-03  4.2e-01
    perfedavg_fo         4  4    0 of 10   2.6e-02  4.4e-01
    hetlora_pruning      1  1    0 of 10   9.5e-01  1.9e+00
    hetlora_spread       3  3    0 of 10   6.3e-03  9.6e-01
    hetlora_below        2  2    0 of 10   4.5e-01  1.4e+00
    hetlora_low          3  3    0 of 10   6.3e-03  9.6e-01
    hetlora_high         4  5    2 of 10   7.8e-04  1.4e-03
    hetlora_truncated    5  5    0 of 10   3.0e-01  1.9e-01

PF2LoRA has the ranks right in every problem, whatever the hypergradient: both levels share one objective, so all three
have the same stationary points. A single shared matrix (centralized, homlora, perfedavg) fits neither client. Rows
`tuned` show the same models after ten more steps on a client's own examples, which flatters any rank of 5 or more.
HETLoRA's zero-padded averages shrink the ranks that only one client owns, and its pruning rule falls to rank 1 on this
loss; `truncated` is its average as a client receives it, all other rows of it what clients trained last.
"""

from ml_collections import ConfigDict


def get_config():
    config = ConfigDict({"study": "rank_recovery"})
    config.rank = 4  # r, of common adapters
    config.client_rank = 1  # r~, of personal ones; clients' true ranks are r - r~ and r + r~
    config.lr_personal = 0.3  # alpha, SGD
    config.lr_common = 0.03  # eta, SGD; of HOMLoRA and HETLoRA too
    config.lr_meta = 0.01  # Per-FedAvg, SGD; its outer step
    config.lr_inner = 0.1  # the step inside of its objective, and that of personalization
    config.gamma = 0.99  # HETLoRA: share of its ranks that a client keeps when it prunes
    config.penalty = 1e-3  # on its tail
    config.interval = 10  # local steps of a round
    config.steps = 6000  # local steps in all
    config.seeds = 10
    config.rank_tolerance = 0.01  # singular values count that exceed it times the largest
    config.only = ()  # names of methods; all by default
    return config
