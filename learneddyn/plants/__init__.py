"""Real systems that Gymnasium lacks, as Gymnasium environments: judges for learned worlds, like any other environment.

One file per plant. `learneddyn.plants.base.Plant` turns MuJoCo's XML, written for the parameters at hand, into an
environment; a plant adds its XML, starts and judgement. `learneddyn` registers each by an entry point given as a
string, so that nothing here is imported before ``gym.make`` asks for it; `learneddyn.tasks` holds the task of each.

A plant with other parameters is another real system, under an id of its own::

    gym.register("mine/LongPole-v0", "learneddyn.plants.cartpole_swingup:CartPoleSwingUp", max_episode_steps=200,
                 kwargs={"pole_length": 1.2})
    tasks.register(learneddyn.tasks.cartpole_swingup.swing_up("mine/LongPole-v0", pole_length=1.2))
"""
