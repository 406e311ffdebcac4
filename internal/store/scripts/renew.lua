#!lua flags=allow-oom
-- renew makes a lease last its length again.
--
-- arg: owner, fence, length.
load()
local l = lease()
if not holds(l) then return reply('LOST') end
putLease(l.fence, tonumber(arg.length), arg.owner)
commit()
return reply('OK')
