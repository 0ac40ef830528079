#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# The command-line utilities of IBM's TSS (Debian package tss2) in the working directory, against the TPM that the TPM_*
# variables name; $1 is the port of its control channel. Subjects follow the list of IBM's regression suite.
#
# `ok` steps must succeed and `no` steps must be refused; each prints its command, exit code and what the utility said,
# so that two TPMs can be compared. `okq` does not print what is random or depends on time.
set -u
control=$1
count=0 bad=0
run() {
    count=$((count + 1))
    "$@" >out 2>&1
    code=$?
    # Before its first use of an algorithm a TPM tests it and asks to send the command again.
    tries=0
    while grep -q 00000922 out && [ $tries -lt 10 ]; do
        tries=$((tries + 1))
        "$@" >out 2>&1
        code=$?
    done
    echo "$count: $* -> $code"
}
ok() { run "$@"; cat out; [ $code -eq 0 ] || { bad=$((bad + 1)); echo UNEXPECTED; }; }
okq() { run "$@"; [ $code -eq 0 ] || { bad=$((bad + 1)); cat out; echo UNEXPECTED; }; }
no() { run "$@"; cat out; [ $code -ne 0 ] || { bad=$((bad + 1)); echo UNEXPECTED; }; }
title() { echo "--- $1"; }
power_cycle() { swtpm_ioctl --tcp "127.0.0.1:$control" -i || echo 'no power cycle'; }
gone() { for h in "$@"; do ok tssflushcontext -ha "$h"; done; }

printf 'a message to sign' >msg
printf 'another message' >msg2
printf '0123456789abcdef' >key16
printf 'sixteen bytes in' >block
head -c 8 /dev/zero >zeros

title 'PCR banks, start-up and shut-down'
ok tsspcrallocate -sha256
ok tssshutdown -c
power_cycle
ok tssstartup -c
no tssstartup -c
# This client has room for three banks. The engine lists four, unused ones too, in this and two more responses.
no tssgetcapability -cap 5
ok tssgetcapability -cap 8
ok tssgetcapability -cap 0 -pr 1 -pc 20
ok tssgetcapability -cap 2 -pr 11f -pc 200

title 'random numbers'
okq tssgetrandom -by 32
okq tssstirrandom -if msg
okq tssgetrandom -by 64 -nz

title 'PCRs'
ok tsspcrreset -ha 16
ok tsspcrread -ha 16 -halg sha256
ok tsspcrextend -ha 16 -halg sha256 -ic measured
ok tsspcrread -ha 16 -halg sha256
ok tsspcrread -ha 16 -halg sha384
no tsspcrevent -ha 16 -if msg
ok tsspcrread -ha 16 -halg sha384
no tsspcrextend -ha 24 -halg sha256 -ic x
no tsspcrreset -ha 0
ok tsshashsequencestart -halg null
ok tsssequenceupdate -hs 80000000 -if msg
no tsseventsequencecomplete -hs 80000000 -ha 23 -if msg2
ok tsspcrread -ha 23 -halg sha256

title 'hashes and HMACs'
ok tsshash -hi p -halg sha256 -if msg
ok tsshash -hi p -halg sha384 -if msg -tk hash.tk
ok tsshash -hi o -halg sha1 -ic abc
ok tsshashsequencestart -halg sha256 -pwda seq
no tsssequenceupdate -hs 80000000 -pwds wrong -if msg
ok tsssequenceupdate -hs 80000000 -pwds seq -if msg
ok tsssequencecomplete -hs 80000000 -pwds seq -if msg2 -of seq.bin

title 'hierarchies'
ok tsshierarchychangeauth -hi o -pwdn own
no tsscreateprimary -hi o -st -pwdk sto
no tsscreateprimary -hi o -st -pwdk sto -pwdp wrong
okq tsscreateprimary -hi o -st -pwdk sto -pwdp own -tk pri.tk -ch pri.ch
ok tsshierarchychangeauth -hi o -pwda own
ok tsshierarchycontrol -hi p -he e -state 0
no tsscreateprimary -hi e -st
ok tsshierarchycontrol -hi p -he e -state 1
no tssclockset -hi o -time 1
okq tssreadclock
okq tssclockset -hi p -time 100000000
no tssclockset -hi p -time 1
ok tssclockrateadjust -hi p -adj +
ok tssclockrateadjust -hi p -adj -

title 'keys: create, load, sign, verify, RSA and ECC'
okq tsscreate -hp 80000000 -si -kt f -kt p -pwdp sto -pwdk sig -opr sig.priv -opu sig.pub -opem sig.pem
no tssload -hp 80000000 -pwdp wrong -ipr sig.priv -ipu sig.pub
okq tssload -hp 80000000 -pwdp sto -ipr sig.priv -ipu sig.pub
no tsssign -hk 80000001 -halg sha256 -if msg -pwdk wrong
okq tsssign -hk 80000001 -halg sha256 -if msg -pwdk sig -os msg.sig -ipu sig.pub
okq tssverifysignature -hk 80000001 -halg sha256 -if msg -is msg.sig -tk ver.tk
no tssverifysignature -hk 80000001 -halg sha256 -if msg2 -is msg.sig
ok tssverifysignature -ipem sig.pem -halg sha256 -if msg -is msg.sig
okq tsscreate -hp 80000000 -si -ecc nistp256 -kt f -kt p -pwdp sto -opr ecs.priv -opu ecs.pub -opem ecs.pem
okq tssload -hp 80000000 -pwdp sto -ipr ecs.priv -ipu ecs.pub
okq tsssign -hk 80000002 -ecc -halg sha256 -if msg -os ecs.sig
okq tssverifysignature -hk 80000002 -ecc -halg sha256 -if msg -is ecs.sig
no tsssign -hk 80000000 -halg sha256 -if msg -pwdk sto
okq tssreadpublic -ho 80000001 -opu read.pub
ok cmp read.pub sig.pub
gone 80000002
okq tssobjectchangeauth -hp 80000000 -ho 80000001 -pwdo sig -pwdn sig2 -opr sig2.priv
gone 80000001
okq tssload -hp 80000000 -pwdp sto -ipr sig2.priv -ipu sig.pub
no tsssign -hk 80000001 -halg sha256 -if msg -pwdk sig
okq tsssign -hk 80000001 -halg sha256 -if msg -pwdk sig2
ok tsscontextsave -ha 80000001 -of sig.ctx
gone 80000001
ok tsscontextload -if sig.ctx
okq tsssign -hk 80000001 -halg sha256 -if msg -pwdk sig2
gone 80000001
ok tsseccparameters -cv nistp256
okq tsseccparameters -cv bnp256
okq tssecephemeral -ecc nistp256

title 'RSA encryption, symmetric encryption, keyed hashes'
okq tsscreate -hp 80000000 -deo -kt f -kt p -pwdp sto -pwdk dec -opr dec.priv -opu dec.pub
okq tssload -hp 80000000 -pwdp sto -ipr dec.priv -ipu dec.pub
okq tssrsaencrypt -hk 80000001 -id key16 -oe enc.bin
okq tssrsadecrypt -hk 80000001 -ie enc.bin -od dec.bin -pwdk dec
ok cmp key16 dec.bin
no tssrsadecrypt -hk 80000001 -ie enc.bin -od dec.bin -pwdk wrong
gone 80000001
okq tsscreate -hp 80000000 -des -kt f -kt p -pwdp sto -pwdk aes -opr des.priv -opu des.pub
okq tssload -hp 80000000 -pwdp sto -ipr des.priv -ipu des.pub
okq tssencryptdecrypt -hk 80000001 -if block -of cipher -pwdk aes
okq tssencryptdecrypt -hk 80000001 -d -if cipher -of plain -pwdk aes
ok cmp block plain
okq tssencryptdecrypt -hk 80000001 -2 -d -if cipher -of plain2 -pwdk aes
ok cmp block plain2
gone 80000001
okq tsscreate -hp 80000000 -kh -kt f -kt p -pwdp sto -pwdk kh -opr kh.priv -opu kh.pub
okq tssload -hp 80000000 -pwdp sto -ipr kh.priv -ipu kh.pub
okq tsshmac -hk 80000001 -if msg -os h1 -pwdk kh
ok tsshmacstart -hk 80000001 -pwdk kh -pwda hs
ok tsssequenceupdate -hs 80000002 -pwds hs -if msg
okq tsssequencecomplete -hs 80000002 -pwds hs -of h2
ok cmp h1 h2
gone 80000001

title 'sessions: HMAC, salted, bound, encrypted, both directions'
ok tssstartauthsession -se h
okq tsscreate -hp 80000000 -si -kt f -kt p -pwdp sto -pwdk s -opr s.priv -opu s.pub -se0 02000000 1
okq tssload -hp 80000000 -pwdp sto -ipr s.priv -ipu s.pub -se0 02000000 1
no tsssign -hk 80000001 -halg sha256 -if msg -pwdk wrong -se0 02000000 1
okq tsssign -hk 80000001 -halg sha256 -if msg -pwdk s -se0 02000000 0
no tssflushcontext -ha 02000000
okq tsscreateprimary -hi n -deo -pwdk salt
ok tssstartauthsession -se h -hs 80000002 -sym aes
okq tsssign -hk 80000001 -halg sha256 -if msg -pwdk s -se0 02000000 21
no tsssign -hk 80000001 -halg sha256 -if msg -pwdk s -se0 02000000 41
okq tssgetrandom -by 16 -se0 02000000 41
okq tssnvdefinespace -hi o -ha 01000010 -sz 16 -pwdn nv -se0 02000000 21
okq tssnvwrite -ha 01000010 -pwdn nv -if key16 -se0 02000000 21
okq tssnvread -ha 01000010 -pwdn nv -sz 16 -of nv.bin -se0 02000000 41
ok cmp key16 nv.bin
gone 02000000
gone 80000002
ok tssstartauthsession -se h -bi 80000001 -pwdb s
okq tsssign -hk 80000001 -halg sha256 -if msg -pwdk s -se0 02000000 1
gone 02000000
ok tssstartauthsession -se h -bi 80000001 -pwdb wrong
no tsssign -hk 80000001 -halg sha256 -if msg -pwdk s -se0 02000000 1
gone 02000000
ok tssnvundefinespace -hi o -ha 01000010
gone 80000001

title 'NV: ordinary, counter, bits, extend, PIN, locks'
ok tssnvdefinespace -hi o -ha 01000001 -pwdn nnn -sz 16
no tssnvdefinespace -hi o -ha 01000001 -pwdn nnn -sz 16
no tssnvread -ha 01000001 -pwdn nnn -sz 16
ok tssnvwrite -ha 01000001 -pwdn nnn -if key16
no tssnvread -ha 01000001 -pwdn wrong -sz 16
ok tssnvread -ha 01000001 -pwdn nnn -sz 16
ok tssnvread -ha 01000001 -pwdn nnn -sz 8 -off 8
no tssnvread -ha 01000001 -pwdn nnn -sz 8 -off 9
ok tssnvreadpublic -ha 01000001
ok tssstartauthsession -se p
ok tsspolicycommandcode -ha 03000000 -cc 13b
ok tsspolicyauthvalue -ha 03000000
no tssnvchangeauth -ha 01000001 -pwdo nnn -pwdn xxx -se0 03000000 0
gone 03000000
ok tssnvundefinespace -hi o -ha 01000001
ok tssnvdefinespace -hi o -ha 01000002 -pwdn nnn -ty c
no tssnvread -ha 01000002 -pwdn nnn -sz 8
ok tssnvincrement -ha 01000002 -pwdn nnn
ok tssnvread -ha 01000002 -pwdn nnn -sz 8
ok tssnvincrement -ha 01000002 -pwdn nnn
ok tssnvread -ha 01000002 -pwdn nnn -sz 8
ok tssnvundefinespace -hi o -ha 01000002
ok tssnvdefinespace -hi o -ha 01000003 -pwdn nnn -ty b
ok tssnvsetbits -ha 01000003 -pwdn nnn -bit 4
ok tssnvsetbits -ha 01000003 -pwdn nnn -bit 63
ok tssnvread -ha 01000003 -pwdn nnn -sz 8
ok tssnvundefinespace -hi o -ha 01000003
ok tssnvdefinespace -hi o -ha 01000004 -pwdn nnn -ty e
ok tssnvextend -ha 01000004 -pwdn nnn -if msg
ok tssnvread -ha 01000004 -pwdn nnn -sz 32
ok tssnvundefinespace -hi o -ha 01000004
ok tssnvdefinespace -hi o -ha 01000005 -pwdn nnn -sz 8 +at rst +at wst
ok tssnvwrite -ha 01000005 -pwdn nnn -ic eightbyt
ok tssnvwritelock -ha 01000005 -pwdn nnn
no tssnvwrite -ha 01000005 -pwdn nnn -ic other888
ok tssnvreadlock -ha 01000005 -pwdn nnn
no tssnvread -ha 01000005 -pwdn nnn -sz 8
ok tssshutdown -c
power_cycle
ok tssstartup -c
ok tssnvread -ha 01000005 -pwdn nnn -sz 8
ok tssnvwrite -ha 01000005 -pwdn nnn -ic other888
ok tssnvundefinespace -hi o -ha 01000005
ok tssnvdefinespace -hi o -ha 01000006 -pwdn nnn -sz 8 +at gl
ok tssnvwrite -ha 01000006 -pwdn nnn -ic eightbyt
ok tssnvglobalwritelock -hia o
no tssnvwrite -ha 01000006 -pwdn nnn -ic other888
ok tssnvundefinespace -hi o -ha 01000006
no tssnvdefinespace -hi o -ha 01000007 -sz 60000

title 'attestation: quote, certify, time, audit'
okq tsscreateprimary -hi e -sir -pwdk ak -opu ak.pub -tk ak.tk -ch ak.ch
ok tsspcrreset -ha 16
okq tssquote -hp 16 -hp 0 -hk 80000000 -pwdk ak -palg sha256 -qd key16 -os q.sig -oa q.att
okq tssverifysignature -hk 80000000 -if q.att -is q.sig
no tssverifysignature -hk 80000000 -if msg -is q.sig
okq tsscertifycreation -ho 80000000 -hk 80000000 -pwdk ak -tk ak.tk -ch ak.ch
no tsscertify -ho 80000000 -hk 80000000 -pwdk ak
okq tsscertify -ho 80000000 -pwdo ak -hk 80000000 -pwdk ak
okq tssgettime -hk 80000000 -pwdk ak
ok tssnvdefinespace -hi o -ha 01000008 -pwdn nnn -sz 16
ok tssnvwrite -ha 01000008 -pwdn nnn -if key16
okq tssnvcertify -ha 01000008 -pwdn nnn -hk 80000000 -pwdk ak -sz 16 -oa nv.att -os nv.sig
ok tssnvundefinespace -hi o -ha 01000008
ok tssstartauthsession -se h
okq tssgetcapability -cap 2 -pr 11f -pc 2
okq tssgetrandom -by 8 -se0 02000000 81
okq tssgetsessionauditdigest -hs 02000000 -hk 80000000 -pwdk ak
gone 02000000
okq tssgetcommandauditdigest -hk 80000000 -pwdk ak
gone 80000000
okq tsscreateprimary -hi e -ecc nistp256 -sir
okq tssquote -hp 16 -hk 80000000 -salg ecc -palg sha384
gone 80000000

title 'policies'
okq tsscreateprimary -hi o -st -pwdk sto
ok tssstartauthsession -se t
ok tsspolicypcr -ha 03000000 -halg sha256 -bm 10000
ok tsspolicygetdigest -ha 03000000 -of pcr.pol
gone 03000000
okq tsscreate -hp 80000000 -bl -kt f -kt p -pwdp sto -if key16 -pol pcr.pol -uwa -opr seal.priv -opu seal.pub
okq tssload -hp 80000000 -pwdp sto -ipr seal.priv -ipu seal.pub
no tssunseal -ha 80000001 -of unsealed
ok tssstartauthsession -se p
ok tsspolicypcr -ha 03000000 -halg sha256 -bm 10000
ok tssunseal -ha 80000001 -of unsealed -se0 03000000 1
ok cmp unsealed key16
ok tsspcrextend -ha 16 -halg sha256 -ic changed
ok tsspolicyrestart -ha 03000000
ok tsspolicypcr -ha 03000000 -halg sha256 -bm 10000
no tssunseal -ha 80000001 -of unsealed -se0 03000000 1
gone 03000000
gone 80000001
ok tssstartauthsession -se t
ok tsspolicypassword -ha 03000000
ok tsspolicygetdigest -ha 03000000 -of pw.pol
ok tsspolicyrestart -ha 03000000
ok tsspolicycommandcode -ha 03000000 -cc 15d
ok tsspolicygetdigest -ha 03000000 -of cc.pol
ok tsspolicyrestart -ha 03000000
ok tsspolicyor -ha 03000000 -if pw.pol -if cc.pol
ok tsspolicygetdigest -ha 03000000 -of or.pol
gone 03000000
okq tsscreate -hp 80000000 -si -kt f -kt p -pwdp sto -pwdk pk -pol or.pol -uwa -opr pol.priv -opu pol.pub
okq tssload -hp 80000000 -pwdp sto -ipr pol.priv -ipu pol.pub
ok tssstartauthsession -se p
ok tsspolicycommandcode -ha 03000000 -cc 15d
no tsssign -hk 80000001 -if msg -se0 03000000 1
ok tsspolicyrestart -ha 03000000
ok tsspolicycommandcode -ha 03000000 -cc 15d
ok tsspolicyor -ha 03000000 -if pw.pol -if cc.pol
okq tsssign -hk 80000001 -if msg -se0 03000000 1
ok tsspolicyrestart -ha 03000000
no tsspolicyor -ha 03000000 -if pw.pol -if cc.pol
gone 03000000
gone 80000001
ok tssstartauthsession -se p -on nonce
ok tsspolicysecret -ha 4000000c -hs 03000000
ok tsspolicygetdigest -ha 03000000
gone 03000000
ok tssstartauthsession -se p -on nonce
okq tsspolicysecret -ha 40000001 -hs 03000000 -in nonce -exp -200 -tk sec.tk -to sec.to
ok tsspolicygetdigest -ha 03000000
ok tsspolicyrestart -ha 03000000
ok tsspolicyticket -ha 03000000 -to sec.to -hi o -tk sec.tk
gone 03000000
ok openssl genrsa -out ext.pem -aes256 -passout pass:rrrr 2048
ok openssl rsa -passin pass:rrrr -in ext.pem -pubout -out extpub.pem
okq tssloadexternal -rsa -ipem extpub.pem -si
ok tssstartauthsession -se p -on nonce
okq tsspolicysigned -hk 80000001 -ha 03000000 -in nonce -sk ext.pem -pwdk rrrr
okq tsspolicygetdigest -ha 03000000
gone 03000000
gone 80000001
ok tssnvdefinespace -hi o -ha 01000009 -pwdn nnn -sz 8
ok tssnvwrite -ha 01000009 -pwdn nnn -ic eightbyt
ok tssstartauthsession -se p
ok tsspolicynv -ha 01000009 -pwda nnn -hs 03000000 -ic eightbyt -op 0
no tsspolicynv -ha 01000009 -pwda nnn -hs 03000000 -ic eightbyx -op 0
ok tsspolicynvwritten -hs 03000000 -ws y
ok tsspolicygetdigest -ha 03000000
ok tsspolicyrestart -ha 03000000
ok tsspolicycountertimer -ha 03000000 -if zeros -off 0 -op 3
no tsspolicycountertimer -ha 03000000 -if zeros -off 0 -op 5
gone 03000000
ok tssnvundefinespace -hi o -ha 01000009

title 'duplication, import, rewrap'
ok tssstartauthsession -se t
ok tsspolicycommandcode -ha 03000000 -cc 14b
ok tsspolicygetdigest -ha 03000000 -of dup.pol
gone 03000000
okq tsscreate -hp 80000000 -si -kt nf -kt np -pwdp sto -pwdk dupk -pol dup.pol -opr dk.priv -opu dk.pub
okq tssload -hp 80000000 -pwdp sto -ipr dk.priv -ipu dk.pub
okq tsscreateprimary -hi p -st -pwdk newp
no tssduplicate -ho 80000001 -hp 80000002 -od d.priv -oss d.seed
ok tssstartauthsession -se p
ok tsspolicycommandcode -ha 03000000 -cc 14b
okq tssduplicate -ho 80000001 -hp 80000002 -od d.priv -oss d.seed -se0 03000000 0
gone 80000001
no tssimport -hp 80000000 -pwdp sto -ipu dk.pub -id d.priv -iss d.seed -opr imp.priv
okq tssimport -hp 80000002 -pwdp newp -ipu dk.pub -id d.priv -iss d.seed -opr imp.priv
okq tssload -hp 80000002 -pwdp newp -ipr imp.priv -ipu dk.pub
okq tsssign -hk 80000001 -if msg -pwdk dupk
gone 80000001 80000002
okq tssimportpem -hp 80000000 -pwdp sto -ipem ext.pem -pwdk rrrr -opu pem.pub -opr pem.priv
okq tssload -hp 80000000 -pwdp sto -ipr pem.priv -ipu pem.pub
okq tsssign -hk 80000001 -if msg -pwdk rrrr
gone 80000001

title 'credentials, persistence, capabilities'
okq tsscreateprimary -hi e -st -pwdk ek
okq tsscreate -hp 80000000 -sir -kt f -kt p -pwdp sto -pwdk id -opr id.priv -opu id.pub
okq tssload -hp 80000000 -pwdp sto -ipr id.priv -ipu id.pub
okq tssmakecredential -ha 80000001 -icred key16 -in h80000002.bin -ocred cred -os cred.secret
no tssactivatecredential -ha 80000002 -hk 80000001 -icred cred -is cred.secret -pwda wrong -pwdk ek
okq tssactivatecredential -ha 80000002 -hk 80000001 -icred cred -is cred.secret -pwda id -pwdk ek -ocred cred.out
ok cmp cred.out key16
gone 80000001
ok tssevictcontrol -hi o -ho 80000002 -hp 81000001
ok tssgetcapability -cap 1 -pr 81000000
no tssevictcontrol -hi o -ho 80000002 -hp 81800001
gone 80000002
# A restricted key signs nothing that the TPM has not made or hashed itself.
no tsssign -hk 81000001 -if msg -pwdk id
okq tssquote -hp 16 -hk 81000001 -pwdk id
ok tssevictcontrol -hi o -ho 81000001 -hp 81000001
no tsssign -hk 81000001 -if msg -pwdk id
ok tssgetcapability -cap 1 -pr 81000000
ok tssgetcapability -cap 1 -pr 80000000
gone 80000000

title 'dictionary attack and clear'
ok tsshierarchychangeauth -hi l -pwdn lock
ok tssdictionaryattackparameters -pwd lock -nmt 2 -nrt 1000 -lr 1000
okq tsscreateprimary -hi o -si -da -pwdk daa
no tsssign -hk 80000000 -if msg -pwdk wrong
no tsssign -hk 80000000 -if msg -pwdk wrong
no tsssign -hk 80000000 -if msg -pwdk daa
no tssdictionaryattacklockreset -pwd wrong
no tssdictionaryattacklockreset -pwd lock
ok tssclearcontrol -hi p -state 1
no tssclear -hi p
ok tssclearcontrol -hi p -state 0
ok tssclear -hi p
no tsssign -hk 80000000 -if msg -pwdk daa
ok tssdictionaryattacklockreset
ok tssgetcapability -cap 1 -pr 80000000
ok tsschangepps
ok tsschangeeps
ok tssshutdown -s
power_cycle
ok tssstartup -s
okq tssgetrandom -by 8

echo "$count steps, $bad unexpected"
[ "$bad" -eq 0 ]
