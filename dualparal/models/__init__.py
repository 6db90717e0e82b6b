"""Model adapters: the only modules that know a model's layers."""
