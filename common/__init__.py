"""The parts on which both sides of the wire agree. Imports nothing else of this project."""
