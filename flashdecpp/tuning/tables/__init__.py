"""The tables that come with the package: DEVICE.json, each as `flashdecpp tune --output` wrote it."""
