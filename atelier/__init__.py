"""`atelier <sub-command>`: the doors of the house. `make` opens the same ones, with variables in place of flags."""
