"""Train agents inside learned simulators.

A learned dynamics model becomes a World; a World is a Gymnasium environment, a planner's simulator and an agent's
imagination; MuJoCo is the judge. Importing the package registers ``LearnedDyn-v0`` and loads nothing heavy::

    import gymnasium as gym
    import learneddyn

    env = gym.make("LearnedDyn-v0")
"""

from typing import Any

from gymnasium.envs.registration import register, registry

__version__ = "0.1.0"


if "LearnedDyn-v0" not in registry:
    register(
        id="LearnedDyn-v0",
        entry_point="learneddyn.envs.learned:make_env",
        vector_entry_point="learneddyn.envs.vector:make_vector_env",
    )

if "learneddyn/CartPoleSwingUp-v0" not in registry:
    register(
        id="learneddyn/CartPoleSwingUp-v0",
        entry_point="learneddyn.plants.cartpole_swingup:CartPoleSwingUp",
        max_episode_steps=200,
    )

if "learneddyn/HeavyPendulum-v0" not in registry:
    register(
        id="learneddyn/HeavyPendulum-v0",
        entry_point="learneddyn.plants.heavy_pendulum:HeavyPendulum",
        max_episode_steps=1000,
    )

_flows: dict[str, dict[str, Any]] = {
    "learneddyn/Flow-v0": {},
    "learneddyn/Lorenz63-v0": {"flow": "Lorenz63"},
    "learneddyn/Lorenz63Held-v0": {
        "flow": "Lorenz63",
        "forced": [0],
        "push": 10.0,
        "target": [1.0707, 0.9418, 0.4002],  # the fixed point (72^(1/2), 72^(1/2), 27)
    },
}
for _id, _kwargs in _flows.items():
    if _id not in registry:
        register(
            id=_id,
            entry_point="learneddyn.envs.flows:make_flow",
            vector_entry_point="learneddyn.envs.flows:make_flow_vector",
            kwargs=_kwargs,
        )
