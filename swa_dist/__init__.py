"""Distributed ImageNet fine-tuning with Stochastic Weight Averaging."""
