"""What is asked of an agent in a real environment: reward, termination, start states, the way back to the simulator.

One file per environment, its columns, units and formulas in the docstring. `get` finds a task by the exact Gymnasium
id; nothing here creates a simulator until a task that needs one draws its start states.

A part that the observation does not determine is None, and ``task.notes`` says what is missing: the model then learns
it as a head. Exact means equal to the environment within 1e-5 in float64; no part is "almost" right. Models compute in
float32, whose rounding of the observation moves a reward by less than 1e-5 except where a file says otherwise.
"""

from learneddyn.tasks.registry import UnknownTask, get, names, of_env, register, variant

__all__ = ["UnknownTask", "get", "names", "of_env", "register", "variant"]
