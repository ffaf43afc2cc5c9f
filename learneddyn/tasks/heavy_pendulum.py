"""learneddyn/HeavyPendulum-v0: InvertedPendulum-v5 with parts of any mass; what is asked is the same.

Columns, reward, termination and start: `learneddyn.tasks.inverted_pendulum`. A World of any masses takes this task.
"""

from dataclasses import replace

from learneddyn.tasks import inverted_pendulum
from learneddyn.tasks.codec import JointCodec

ID = "learneddyn/HeavyPendulum-v0"

TASK = replace(inverted_pendulum.TASK, real_id=ID, codec=JointCodec(ID, positions=2, velocities=2, lost="nothing"))
