"""The one way in which benches take flags, start ranks, make models and keep rows."""
