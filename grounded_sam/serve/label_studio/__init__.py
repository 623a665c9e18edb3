"""An ML backend of Label Studio: its tasks, its smart tools and its webhook."""
