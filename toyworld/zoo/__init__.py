"""The models embedded in the toy world, and how each is trained; `python -m toyworld.zoo` trains them all anew."""
