"""What the methods do around optimizer steps: the mask phases of RoSA, the draws of ROSA."""
