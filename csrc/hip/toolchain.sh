#!/bin/sh
# Sets up a compiler for AMD GPUs on a Debian system with neither ROCm nor an AMD GPU: clang from the
# installed release, plus HIP's headers and device libraries from later ones, unpacked into a folder.
#
#   csrc/hip/toolchain.sh FOLDER     writes FOLDER/compiler and FOLDER/flags, one flag per line
#
# Versions are not pinned, since later suites keep moving; the first suite to have a package provides it.
set -eu

stop() {
  echo "flashdecpp: no HIP toolchain: $1. Where ROCm is installed, pip install . needs none" >&2
  exit 1
}

[ $# -eq 1 ] || stop "usage: $0 FOLDER"
[ -f "$1/flags" ] && exit 0
mkdir -p "$1" || stop "$1 cannot be made"
folder=$(cd "$1" && pwd)
command -v apt-get >/dev/null && command -v dpkg >/dev/null || stop "this is not Debian: apt-get is missing"

find_clang() {
  for name in clang++-19 clang++-20 clang++-18 clang++-17; do
    path=$(command -v "$name") || continue
    bin=$(dirname "$(readlink -f "$path")")
    [ -e "$bin/lld" ] && [ -e "$bin/clang-offload-bundler" ] || continue
    "$path" --print-targets 2>/dev/null | grep -q amdgcn && echo "$path" && return 0
  done
  return 1
}
if ! clang=$(find_clang); then
  packages="clang-19 clang-tools-19 lld-19 llvm-19"
  [ "$(id -u)" = 0 ] || stop "some of $packages are missing; as root: apt-get install $packages"
  { apt-get update -q && apt-get install -y -q --no-install-recommends $packages; } \
    >"$folder/apt.log" 2>&1 || stop "$packages could not be installed; $folder/apt.log says why"
  clang=$(find_clang) || stop "the clang that was installed has no AMDGPU backend"
fi

# Run apt with its own state, so that the system's stays untouched.
keys=/usr/share/keyrings/debian-archive-keyring.gpg
[ -f $keys ] || stop "$keys is missing: is this Debian?"
mirror=$(apt-get indextargets --format '$(REPO_URI)' | grep debian | grep -v security | head -n 1)
[ -n "$mirror" ] || mirror=http://deb.debian.org/debian/
mkdir -p "$folder/apt/lists/partial" "$folder/apt/cache/archives/partial" "$folder/packages"
for suite in trixie forky sid; do echo "deb [signed-by=$keys] $mirror $suite main"; done >"$folder/apt/sources.list"
cat >"$folder/apt/apt.conf" <<END
Dir::Etc::sourcelist "$folder/apt/sources.list"; Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferencesparts "/dev/null"; Dir::State::lists "$folder/apt/lists"; Dir::State::status "/dev/null";
Dir::Cache "$folder/apt/cache"; APT::Sandbox::User "root"; Acquire::Languages "none";
END
export APT_CONFIG="$folder/apt/apt.conf"
apt-get update -q >"$folder/apt.log" 2>&1 || true # one of the three suites may be missing

get() { # downloads the first available package of those given as NAME/SUITE
  for package in "$@"; do
    (cd "$folder/packages" && apt-get download -q "$package") >>"$folder/apt.log" 2>&1 && return 0
  done
  stop "none of $* could be downloaded from $mirror; $folder/apt.log says why"
}
get libamdhip64-dev/forky libamdhip64-dev/sid libamdhip64-dev/trixie
get librocthrust-dev/forky librocthrust-dev/sid librocthrust-dev/trixie
get librocprim-dev/forky librocprim-dev/sid librocprim-dev/trixie
get rocm-device-libs-17/trixie rocm-device-libs-17/forky rocm-device-libs/trixie
for package in "$folder"/packages/*.deb; do dpkg -x "$package" "$folder/root"; done

bitcode=$(find "$folder/root" -type d -path '*amdgcn/bitcode' | head -n 1)
[ -n "$bitcode" ] || stop "the device libraries hold no amdgcn/bitcode"
[ -f "$folder/root/usr/include/hip/hip_runtime.h" ] || stop "the packages hold no hip/hip_runtime.h"
echo "$clang" >"$folder/compiler"
cat >"$folder/flags" <<END
-isystem
$folder/root/usr/include
--rocm-path=$folder/root/usr
--rocm-device-lib-path=$bitcode
END
