"""FCMAE: predict the pixels of hidden patches (arXiv 2301.00808)."""

from configs.schema import FCMAESettings

Settings = FCMAESettings
