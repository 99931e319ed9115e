"""One round of a whole federation as one jitted step: the only place, beside evaluation, that knows of a client axis.

Clients of the cohort are sharded over the mesh axis `clients`; on each device they are worked on in chunks, the clients
of a chunk side by side under `vmap`. Keys follow the client's id, padding is selected away, and uploads are folded
chunk by chunk.
"""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fedjax_peft import trees
from fedjax_peft.types import Algorithm, Array, PyTree

# Streams of randomness that hang off the run's root key.
SERVER, CLIENT, ROUND, PERSONALIZE, ANSWERS = range(5)
# By which axis matrices are split over `model`; the first pattern that is found in a path counts.
_SPLITS = (
    (r"(o_proj|down_proj|c_proj|output/dense)/kernel$", -2),
    (r"kernel$", -1),
    (r"embedding$", -2),
)


def make_mesh(clients: int | None = None, model: int = 1) -> Mesh:
    """Mesh with axes `clients` and `model`; by default all devices go to clients.

    With several processes each has the same number of whole rows, one below the other: devices that share a base belong
    to one process, and so do the slots of its clients.

    Raises:
      ValueError: if the devices do not divide.
    """
    devices = jax.devices()
    if model < 1 or (clients is not None and clients < 1):
        raise ValueError(f"run.mesh is clients={clients}, model={model}, expected positive numbers")
    if clients is None:
        if len(devices) % model:
            raise ValueError(f"run.mesh.model is {model}, which does not divide the {len(devices)} devices")
        clients = len(devices) // model
    if clients * model > len(devices):
        raise ValueError(f"run.mesh asks for {clients} x {model} devices, but there are {len(devices)}")
    if jax.process_count() > 1:
        chosen = np.array(_share_of_each(devices, clients, model)).reshape(clients, model)
        return Mesh(chosen, ("clients", "model"), axis_types=(AxisType.Auto,) * 2)
    return jax.make_mesh(
        (clients, model), ("clients", "model"), (AxisType.Auto,) * 2, devices=devices[: clients * model]
    )


def _share_of_each(devices, clients, model):
    """The devices of a mesh, those of one process after those of another."""
    count, chosen = jax.process_count(), []
    for process in range(count):
        own = sorted((one for one in devices if one.process_index == process), key=lambda one: one.id)
        if clients % count or clients // count * model > len(own):
            raise ValueError(
                f"run.mesh is {clients} x {model}, expected whole rows of {model} devices, as many in each of the "
                f"{count} processes; process {process} has {len(own)} devices"
            )
        chosen += own[: clients // count * model]
    return chosen


def base_shardings(base: PyTree, mesh: Mesh) -> PyTree:
    """Where each parameter of the base lies: replicated over `clients`, its matrices split over `model`.

    The products that lead into a part of a layer are split by their outputs and those that lead back by their inputs,
    so that two sums a layer are all that devices exchange (Shoeybi et al., Megatron-LM, arXiv 1909.08053); embeddings
    by their rows. What does not divide, and all vectors, are replicated.
    """

    def sharding(path, leaf):
        name = trees.path_name(path)
        axis = next((axis for pattern, axis in _SPLITS if re.search(pattern, name)), None)
        if axis is None or leaf.ndim < 2 or leaf.shape[axis] % mesh.shape["model"]:
            return NamedSharding(mesh, P())
        spec = [None] * leaf.ndim
        spec[axis] = "model"
        return NamedSharding(mesh, P(*spec))

    return jax.tree_util.tree_map_with_path(sharding, base)


def shard_base(base: PyTree, mesh: Mesh) -> PyTree:
    """Puts the base on the mesh, as `base_shardings` says."""
    return jax.tree.map(_put, base, base_shardings(base, mesh))


def slots_for(clients: int, mesh: Mesh, chunk: int) -> int:
    """The number of slots C that holds `clients` clients in whole chunks on every device."""
    unit = mesh.shape["clients"] * chunk
    return -(-clients // unit) * unit


def fitting(chunk: int, clients: int, mesh: Mesh) -> int:
    """The chunk, or what each device has of `clients` clients if that is less: slots that stay empty cost as much."""
    return min(chunk, -(-clients // mesh.shape["clients"]))


def here(slots: int) -> slice:
    """Which of the slots of a round are this process's own."""
    own = slots // jax.process_count()
    return slice(jax.process_index() * own, (jax.process_index() + 1) * own)


def place(tree: PyTree, mesh: Mesh) -> PyTree:
    """Puts arrays on the mesh, split over `clients`: `[C, ..]` in one process, the rows of its own slots in several."""
    sharding, count = NamedSharding(mesh, P("clients")), jax.process_count()
    if count == 1:
        return jax.device_put(tree, sharding)

    def own(leaf):
        return jax.make_array_from_process_local_data(sharding, leaf, (len(leaf) * count, *leaf.shape[1:]))

    return jax.tree.map(own, tree)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Puts arrays, the same in every process, everywhere on the mesh."""
    return jax.tree.map(lambda leaf: _put(leaf, NamedSharding(mesh, P())), tree)


def spread(tree: PyTree, base: PyTree) -> PyTree:
    """Puts host arrays `[I, ..]` on the devices that the base is on, split over `clients` where that divides I."""
    shardings = (leaf.sharding for leaf in jax.tree.leaves(base))
    mesh = next((sharding.mesh for sharding in shardings if isinstance(sharding, NamedSharding)), None)
    if mesh is None:
        return tree
    uneven = len(jax.tree.leaves(tree)[0]) % mesh.shape["clients"]
    return jax.device_put(tree, NamedSharding(mesh, P() if uneven else P("clients")))


def local(tree: PyTree, mesh: Mesh) -> PyTree:
    """The part of arrays on the mesh that is on this process's devices, without a copy.

    Of arrays split over `clients` these are the rows of its own slots; others are whole, as every process has them.
    """
    if jax.process_count() == 1:
        return tree
    rows = here(mesh.shape["clients"])
    own = Mesh(mesh.devices[rows], mesh.axis_names, axis_types=mesh.axis_types)

    def part(leaf):
        spec = leaf.sharding.spec
        split = bool(spec) and spec[0] in ("clients", ("clients",))
        shape = (leaf.shape[0] // jax.process_count(), *leaf.shape[1:]) if split else leaf.shape
        shards = [shard.data for shard in leaf.addressable_shards]
        return jax.make_array_from_single_device_arrays(shape, NamedSharding(own, spec), shards)

    return jax.tree.map(part, tree)


def _put(leaf, sharding):
    if jax.process_count() == 1:
        return jax.device_put(leaf, sharding)
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])


def make_init(algorithm: Algorithm, mesh: Mesh) -> Callable[[Array], PyTree]:
    """(root key) -> server, replicated over the mesh."""

    def init(root):
        # Copies, because a server whose leaves alias one buffer cannot be donated.
        return jax.tree.map(jnp.array, algorithm.init(jax.random.fold_in(root, SERVER)))

    start = jax.jit(init, out_shardings=NamedSharding(mesh, P()))
    if algorithm.host_step is None:
        return start
    return lambda root: replicate(algorithm.host_step(start(root)), mesh)


def client_states(algorithm: Algorithm, server: PyTree) -> PyTree:
    """Shapes of one client's state."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(algorithm.init_client, server, jax.ShapeDtypeStruct((), jnp.int32), key)


def make_parts(algorithm: Algorithm) -> Callable[[PyTree, PyTree, Array], PyTree]:
    """Builds what says which part of its base belongs to each client.

    Returns:
      (server, states `[N, ..]`, known [N]) -> parts `[N, ..]`. Clients that are not known have no state yet, and so
      what everybody starts with.
    """

    def part(server, client_id, state, known):
        started = algorithm.init_client(server, client_id, jax.random.key(0))
        return algorithm.part(trees.where(known, state, started))

    @jax.jit
    def parts(server, states, known):
        return jax.vmap(part, (None, 0, 0, 0))(server, jnp.arange(len(known), dtype=jnp.int32), states, known)

    return parts


def make_round(algorithm: Algorithm, mesh: Mesh, chunk: int) -> Callable:
    """Builds the jitted round.

    Args:
      algorithm: the method.
      mesh: with axes `clients` and `model`.
      chunk: clients that a device works on at once; the cohort's slots must fill whole chunks (`slots_for`).

    Returns:
      (base, server, states, fresh, batches, cohort, round, root) -> (server, states, cohort, metrics). `states`
      `[C, ..]` are the stored states of the slots and `fresh` `[C]` says which clients have none yet. Server and states
      are donated. In the returned cohort `reported` is False also for clients whose loss, state or upload is not
      finite; their states come back unchanged. Metrics: `clients` a dict of `[C]`, `finite` `[C]`, `server` a dict of
      scalars.
    """

    def one_client(base, server, state, fresh, client_id, batches, round_key, client_key):
        started = algorithm.init_client(server, client_id, jax.random.fold_in(client_key, client_id))
        state = trees.where(fresh, started, state)
        key = jax.random.fold_in(round_key, client_id)
        new, upload, metrics = algorithm.client_update(base, server, state, batches, key)
        finite = trees.all_finite((new, upload)) & jnp.isfinite(metrics["loss"])
        return new, upload, metrics, finite

    def on_device(base, server, states, fresh, batches, cohort, round_key, client_key):
        def run_chunk(slots):
            states, fresh, batches, cohort = slots
            new, upload, metrics, finite = _side_by_side(one_client, batches)(
                base, server, states, fresh, cohort.ids, batches, round_key, client_key
            )
            active = cohort.reported
            cohort = cohort.replace(reported=active & finite)
            new = trees.where(cohort.reported, new, states)
            upload = trees.where(cohort.reported, upload, trees.zeros_like(upload))
            metrics = trees.where(active, metrics, trees.zeros_like(metrics))
            return algorithm.fold(upload, cohort), (new, cohort, metrics, finite | ~active)

        sums, slots = _by_chunks(run_chunk, (states, fresh, batches, cohort), chunk)
        # XLA refuses a reduction over an axis of one device beside an automatic axis.
        return sums if mesh.shape["clients"] == 1 else jax.lax.psum(sums, "clients"), slots

    def round_step(base, server, states, fresh, batches, cohort, index, root):
        round_key = jax.random.fold_in(jax.random.fold_in(root, ROUND), index)
        client_key = jax.random.fold_in(root, CLIENT)
        sums, (states, cohort, metrics, finite) = _shard(on_device, mesh, _SPECS, (P(), _SPLIT))(
            base, server, states, fresh, batches, cohort, round_key, client_key
        )
        new, server_metrics = algorithm.server_update(server, sums)
        somebody = jnp.any(cohort.reported)
        server = trees.where(somebody, new, server)
        # The mean over nobody is not a number, and JSON has no way to write one.
        server_metrics = trees.where(somebody, server_metrics, trees.zeros_like(server_metrics))
        return server, states, cohort, {"clients": metrics, "finite": finite, "server": server_metrics}

    # Pinned on both sides, because the compiler would split the server over `model`: the next round would compile
    # again, and a server that comes from the host would be donated in another shape than it returns.
    everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, _SPLIT)
    # Every process has to know who reported.
    known = split if jax.process_count() == 1 else everywhere
    return jax.jit(
        round_step,
        donate_argnums=(1, 2),
        in_shardings=(None, everywhere, split, split, None, split, None, None),
        out_shardings=(everywhere, split, known, everywhere),
    )


def make_personalize(algorithm: Algorithm, mesh: Mesh, chunk: int) -> Callable:
    """Builds the jitted personalization of a group of clients.

    Returns:
      (base, server, states, fresh, batches, ids [C], round, root) -> adapters `[C, ..]`.
    """

    def one_client(base, server, state, fresh, client_id, batches, round_key, client_key):
        started = algorithm.init_client(server, client_id, jax.random.fold_in(client_key, client_id))
        state = trees.where(fresh, started, state)
        return algorithm.personalize(base, server, state, batches, jax.random.fold_in(round_key, client_id))

    def on_device(base, server, states, fresh, batches, ids, round_key, client_key):
        def run_chunk(slots):
            states, fresh, batches, ids = slots
            return (), _side_by_side(one_client, batches)(
                base, server, states, fresh, ids, batches, round_key, client_key
            )

        return _by_chunks(run_chunk, (states, fresh, batches, ids), chunk)[1]

    def personalize(base, server, states, fresh, batches, ids, index, root):
        round_key = jax.random.fold_in(jax.random.fold_in(root, PERSONALIZE), index)
        client_key = jax.random.fold_in(root, CLIENT)
        return _shard(on_device, mesh, _SPECS, _SPLIT)(base, server, states, fresh, batches, ids, round_key, client_key)

    return jax.jit(personalize)


def _side_by_side(function, batches):
    """`vmap` over the clients of a chunk, which share the width of each step.

    Without a client axis the choice of a width stays a branch; with one, all widths would be computed.
    """
    axes = (None, None, 0, 0, 0, batches.replace(inputs=0, labels=0, weights=0, width=None, constants=0), None, None)

    def run(base, server, states, fresh, ids, batches, *keys):
        shared = batches.replace(width=jnp.max(batches.width, axis=0))
        return jax.vmap(function, in_axes=axes)(base, server, states, fresh, ids, shared, *keys)

    return run


def _shard(function, mesh, in_specs, out_specs):
    # Manual over clients only: the compiler goes on splitting the base's products over `model`.
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names={"clients"}, check_vma=False
    )


def _by_chunks(function, slots, chunk):
    """Runs a function of `[chunk, ..]` slots -> (sums, `[chunk, ..]` results) over `[C, ..]` slots, in turn."""
    count = jax.tree.leaves(slots)[0].shape[0] // chunk
    if count == 1:
        return function(slots)
    parts = jax.tree.map(lambda leaf: leaf.reshape(count, chunk, *leaf.shape[1:]), slots)
    first = jax.tree.map(lambda leaf: leaf[0], parts)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, first)[0])

    def body(total, part):
        sums, results = function(part)
        return trees.add(total, sums), results

    total, results = jax.lax.scan(body, zeros, parts)
    return total, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), results)


_SPLIT = P("clients")
_SPECS = (P(), P(), _SPLIT, _SPLIT, _SPLIT, _SPLIT, P(), P())
