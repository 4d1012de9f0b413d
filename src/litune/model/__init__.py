"""The model: two towers, their heads and the temperature; and the folder that a run is."""
