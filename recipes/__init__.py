"""Recipes shipped as package data: <paper>/<name>.yaml."""
