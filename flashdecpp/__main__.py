from flashdecpp.cli import main

main()
