# -*- coding: utf-8 -*-
"""Declares UTF-8 and holds Latin-1: café."""

PRICE = "5 £"
