"""Islands: sets of devices that train one copy of the model each and merge what they learnt."""
