"""Tables and pictures of run directories; nothing here is needed to run one."""
