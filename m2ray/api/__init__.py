"""What `import m2ray` offers: extract, plan and open_run, as the commands do it. m2ray/__init__.py imports each when it is asked for."""
