"""What is learnt: one file per objective.

flow.py              flow matching under teacher forcing
consistency.py       consistency distillation
trajectory.py        regression onto the end of a teacher's path
student_forcing.py   rollouts inside training
adversarial.py       generator against discriminator
anchored.py          rollouts pulled back to the level of true frames
anchor.py            the level of true frames, fitted
vae_fit.py           linear encoder and decoder in closed form
vae_stage.py         the VAE, trained from that start
"""
