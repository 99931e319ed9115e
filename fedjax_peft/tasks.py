"""What is learnt and how it is judged, example by example."""

import jax.numpy as jnp
import optax

from fedjax_peft.types import Task


def classification() -> Task:
    """Cross-entropy and accuracy of logits [B, K] against labels [B] int32."""

    def loss(logits, labels):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)

    def metrics(logits, labels):
        return {
            "loss": loss(logits, labels),
            "accuracy": (jnp.argmax(logits, -1) == labels).astype(jnp.float32),
        }

    return Task(loss, metrics)
