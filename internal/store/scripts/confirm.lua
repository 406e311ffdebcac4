#!lua
-- confirm forgets what the server has revoked.
--
-- arg: id.
load('w:' .. arg.id, 'x:' .. arg.id)
put('w:' .. arg.id, nil)
put('x:' .. arg.id, nil)
commit()
return reply('OK')
